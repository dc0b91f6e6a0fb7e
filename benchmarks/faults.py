"""A hundred faults of every kind while an agent learns; one line of JSON for each kind.

    python -m benchmarks.faults --count 100 --out benchmarks/results/faults.jsonl

Simulators on the host raise, hang, die, give NaN or arrays of another shape, each at random
steps. Every kind is one run, which goes on until the fault has come so often. Then the replay is
read: within an episode its rows must follow each other without a gap, whatever happened between
episodes.
"""

import functools
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks.lines import emit, in_words, machine, number, parser_of
from jaxwm import train
from jaxwm.envs.host import HostConfig
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig
from jaxwm.types import Box, Discrete, HostEnv

KINDS = ("raise", "hang", "kill", "nan", "shape")


class Faulty:
    """Episodes of 12 steps; an observation is a number of the episode's own, and the step."""

    def __init__(self, fault: str, probability: float):
        self._fault, self._probability = fault, probability
        self._random = np.random.default_rng()

    def reset(self, seed: int | None) -> dict[str, Any]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._tag, self._time = self._random.uniform(), 0
        return self._look()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        self._time += 1
        obs, end = self._look(), self._time == 12
        if self._random.uniform() < self._probability:
            if self._fault == "raise":
                raise RuntimeError("injected")
            if self._fault == "hang":
                time.sleep(3600)
            if self._fault == "kill":
                os.kill(os.getpid(), 9)
            obs["vector"] = np.full(2, np.nan) if self._fault == "nan" else np.zeros(3)
        return obs, 1.0, end, False

    def _look(self) -> dict[str, Any]:
        return {"vector": np.array([self._tag, self._time])}

    def close(self) -> None:
        pass


def gaps(rows: Any, written: int) -> int:
    """How many rows of the replay do not follow the row before as they should."""
    first, last = rows.is_first[:, 1:written], rows.is_last[:, : written - 1]
    tag, step = np.moveaxis(np.asarray(rows.obs["vector"][:, :written]), -1, 0)
    follows = (tag[:, 1:] == tag[:, :-1]) & (step[:, 1:] == step[:, :-1] + 1) & ~last
    begins = (step[:, 1:] == 0) & (rows.reward[:, 1:written] == 0)
    return int((~np.where(first, begins, follows)).sum() + (~np.isfinite(tag)).sum())


def measure(fault: str, count: int, timeout: float) -> dict[str, Any]:
    """One run with `count` faults of a kind."""
    make = functools.partial(Faulty, fault, 0.02)
    env = HostEnv("faulty", {"vector": Box((2,))}, Discrete(2), make)
    config = RunConfig(
        env="faulty",
        recipe="dreamer_v3",
        size="debug",
        agent=dreamer_v3.sized("debug"),
        envs=4,
        replay=ReplayConfig(200_000, batch_size=4, batch_length=16, train_ratio=2.0),
        host=HostConfig(workers=2, timeout=timeout, max_faults=10 * count),
    )
    program = train.build(config, 50, env)
    chunk, state = program.compile(), program.init()
    begun, metrics = time.perf_counter(), {"host/faults": 0}
    while metrics["host/faults"] < count and not program.fault(state):
        state, metrics = chunk(state)
    seconds = time.perf_counter() - begun
    program.close()
    state = jax.device_get(state._replace(key=()))
    return {
        "fault": fault,
        "counted": metrics["host/faults"],
        "iterations": int(state.clock.iteration),
        "updates": int(state.clock.updates),
        "loss": float(metrics["loss/total"]),
        "gaps_in_replay": gaps(state.buffer.rows, int(state.clock.cursor.written)),
        "abandoned_episodes": int(
            (state.buffer.rows.is_first[:, 1:] & ~state.buffer.rows.is_last[:, :-1]).sum()
        ),
        "timeout": timeout,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--count", type=number, default=100)
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds until a hang is one")
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    for fault in args.faults:
        emit(measure(fault, args.count, args.timeout) | machine(), args.out)


if __name__ == "__main__":
    in_words(main)
