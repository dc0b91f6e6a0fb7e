"""How well simulating on the host and learning on the device overlap; one line of JSON per ratio.

    python -m benchmarks.overlap --milliseconds 5

Three times are taken for the same number of iterations: the simulators alone with fixed actions,
acting and learning alone (environments of the same spaces on the device, which cost nothing), and
both together as `jaxwm train` does them. Perfect overlap takes the larger of the first two. The
simulators sleep, so that they need no core: what is measured is waiting, not sharing.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.lines import emit, in_words, machine, number, parser_of
from benchmarks.throughput import spaces, synthetic
from jaxwm import train
from jaxwm.envs.host import HostConfig, Pool, cores
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig
from jaxwm.types import HostEnv


class Sleeper:
    """Random vectors in episodes of 1,000 steps, each after a nap."""

    def __init__(self, seconds: float):
        self._seconds, self._random, self._time = seconds, np.random.default_rng(0), 0

    def reset(self, seed: int | None) -> dict[str, Any]:
        self._time = 0
        return {"vector": self._random.standard_normal(24)}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        time.sleep(self._seconds)
        self._time += 1
        return {"vector": self._random.standard_normal(24)}, 0.0, False, self._time == 1000

    def close(self) -> None:
        pass


def sleeper(seconds: float) -> HostEnv:
    """The environment of `Sleeper`s."""
    # The module of a script is not importable in a worker; what it refers to goes by value.
    return HostEnv("sleeper", *spaces("vector"), lambda: Sleeper(seconds))


def chunk_seconds(program: train.Program, repeats: int) -> tuple[float, float]:
    """Median wall time of a chunk that learns throughout, and updates in it."""
    chunk, state = program.compile(), program.init()
    times, made = [], []
    while int(state.clock.updates) == 0:  # fill the replay
        state, _ = chunk(state)
    for _ in range(repeats + 1):
        before, start = int(state.clock.updates), time.perf_counter()
        state, metrics = chunk(state)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
        made.append(int(state.clock.updates) - before)
    program.close()
    return statistics.median(times[1:]), statistics.median(made[1:])


def measure(config: RunConfig, seconds: float, iterations: int, repeats: int) -> dict[str, Any]:
    """The three times, in seconds per iteration."""
    env = sleeper(seconds)
    with Pool(env, config.envs, config.host) as pool:
        action, times = pool.reset().action, []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(iterations):
                pool.step(action)
            times.append(time.perf_counter() - start)
    simulating = statistics.median(times)
    learning, _ = chunk_seconds(train.build(config, iterations, synthetic("vector")), repeats)
    together, updates = chunk_seconds(train.build(config, iterations, env), repeats)
    return {
        "train_ratio": config.replay.train_ratio,
        "updates": updates,
        "simulating": simulating / iterations,
        "learning": learning / iterations,
        "together": together / iterations,
        "together_over_larger": together / max(simulating, learning),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--milliseconds", type=float, default=5.0, help="that a step takes")
    parser.add_argument("--size", default="nano", help="a size of dreamer_v3")
    parser.add_argument("--envs", type=number, default=8)
    parser.add_argument("--workers", type=number, default=cores(), help="by default as in a run")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--iterations", type=number, default=256)
    parser.add_argument("--repeats", type=number, default=5)
    args = parser.parse_args()
    for ratio in args.ratios:
        config = RunConfig(
            env="sleeper",
            recipe="dreamer_v3",
            size=args.size,
            agent=dreamer_v3.sized(args.size),
            envs=args.envs,
            replay=ReplayConfig(20_000, batch_size=4, batch_length=32, train_ratio=ratio),
            host=HostConfig(workers=args.workers),
        )
        result = {
            "size": args.size,
            "envs": args.envs,
            "workers": args.workers,
            "milliseconds": args.milliseconds,
            **measure(config, args.milliseconds / 1e3, args.iterations, args.repeats),
            **machine(),
        }
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}
        emit(rounded, args.out)


if __name__ == "__main__":
    in_words(main)
