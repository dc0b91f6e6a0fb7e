"""The whole training loop: environment steps per second with updates, and of collecting alone.

    python -m benchmarks.loop --out benchmarks/results/loop.jsonl

One line of JSON each for

- training: environments, replay and learning in one program, at a train ratio;
- collecting: the same program, acted in and stored from by a policy that never learns, for some
  numbers of environments.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax

from benchmarks.lines import emit, in_words, machine, number, parser_of
from jaxwm import train
from jaxwm.backend import compute_dtype
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig
from jaxwm.run import memory
from jaxwm.train import mesh
from jaxwm.types import Env

ENV = "gymnax/CartPole-v1"
WORK = ("training", "collecting")


class Run:
    """A compiled run at its beginning; each call takes it through one chunk.

    Args:
      config: the run.
      iterations: iterations of a chunk.
      single: the single environment, if it is not the one that `config.env` names.

    Raises:
      JaxwmError: if it does not fit into the memory.
    """

    def __init__(self, config: RunConfig, iterations: int, single: Env | None = None):
        self.program = train.build(config, iterations, single)
        self.steps = iterations * config.envs
        start = time.perf_counter()
        self.chunk = self.program.compile()
        self.compile_seconds = time.perf_counter() - start
        memory.ensure_free(memory.estimate(self.program, self.chunk, config))
        self.state = self.program.init()

    def __call__(self) -> None:
        self.state, metrics = self.chunk(self.state)
        jax.block_until_ready((self.state, metrics))

    @property
    def updates(self) -> int:
        return int(self.state.clock.updates)

    def seconds(self, repeats: int) -> list[float]:
        """Wall time of each of so many chunks."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self()
            times.append(time.perf_counter() - start)
        return times


def training(
    size: str,
    envs: int,
    ratio: float,
    batch: int = 16,
    length: int = 64,
    dtype: str = "auto",
    capacity: int = 100_000,
) -> RunConfig:
    """A run that learns."""
    agent: Any = dataclasses.replace(dreamer_v3.sized(size), dtype=dtype)
    replay = ReplayConfig(capacity, batch, length, ratio)
    return RunConfig(env=ENV, recipe="dreamer_v3", size=size, agent=agent, envs=envs, replay=replay)


def collecting(size: str, envs: int, rows: int = 128, dtype: str = "auto") -> RunConfig:
    """A run that never learns, with a replay of so many rows for each environment."""
    return training(size, envs, ratio=0, dtype=dtype, capacity=rows * envs)


def measure(run: Run, repeats: int) -> dict[str, Any]:
    """Medians of so many chunks, and what they held."""
    before = run.updates
    times = run.seconds(repeats)
    median, made = statistics.median(times), (run.updates - before) / repeats
    line = {
        "env_steps_per_second": run.steps / median,
        "env_steps_per_second_best": run.steps / min(times),
        "updates_per_second": made / median,
        "env_steps_per_chunk": run.steps,
        "chunks": repeats,
    }
    if made:
        line["seconds_per_update"] = median / made
    return line | {
        "compile_seconds": run.compile_seconds,
        "temporary_bytes": run.chunk.temporary,
        "replay_bytes": run.program.replay.nbytes * run.program.layout.members,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", nargs="+", default=WORK, choices=WORK)
    parser.add_argument("--size", default="size1m", help="a size of dreamer_v3, to train")
    parser.add_argument("--envs", type=number, default=16, help="environments of the training")
    parser.add_argument("--ratio", type=float, default=32, help="rows trained on per step")
    parser.add_argument("--batch", type=number, default=16)
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--shards", type=number, default=1, help="shards of the training")
    parser.add_argument("--iterations", type=number, default=8, help="in a chunk of the training")
    parser.add_argument("--collect-size", default="nano", help="a size of dreamer_v3, to collect")
    parser.add_argument("--collect-envs", type=number, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--repeats", type=number, default=10, help="chunks that count")
    args = parser.parse_args()
    learns = (args.size, args.envs, args.ratio, args.batch, args.length, args.dtype)
    learning = dataclasses.replace(training(*learns), shards=args.shards)
    mesh.use_cores(learning)
    runs = [("training", learning, args.iterations)]
    for envs in args.collect_envs:
        config = collecting(args.collect_size, envs, dtype=args.dtype)
        runs.append(("collecting", config, max(8, 16_384 // envs)))
    for work, config, iterations in runs:
        if work not in args.work:
            continue
        run = Run(config, iterations)
        run()
        while work == "training" and run.updates == 0:  # fill the replay
            run()
        line = {
            "work": work,
            "env": config.env,
            "envs": config.envs,
            "shards": config.shards,
            "size": config.size,
            "dtype": compute_dtype(config.agent.dtype),
            "train_ratio": config.replay.train_ratio if work == "training" else 0,
            "batch": [config.replay.batch_size, config.replay.batch_length],
            **measure(run, args.repeats),
        }
        emit(line | machine(), args.out)


if __name__ == "__main__":
    in_words(main)
