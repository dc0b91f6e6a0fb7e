"""Compares what a run is said to take of the memory with what it then takes, on three sizes.

    python -m tests.faults.preflight --out benchmarks/results/reliability.jsonl

On a CPU, where the device's memory is that of the process: a process compiles its program, and the
most that it holds while it learns and saves, with a replay that is full, is compared with the sum
that is told before, within 10 %. To fill it would take hours, so its counter is set forward.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm import train
from jaxwm.envs.host import resident_bytes
from jaxwm.recipes import dreamer_v3
from jaxwm.run import memory
from jaxwm.run.saver import Saver
from tests.faults.damage import command

_WITHIN = 0.10
# Rows of replay that make it the larger part, as it is where memory is short.
CAPACITIES = {"nano": 1_500_000, "size1m": 500_000, "size12m": 250_000}
_ENVS = 16


def take(size: str, capacity: int, folder: Path) -> dict[str, int]:
    """What is told, and what is taken, in this process."""
    config = dreamer_v3.config("gymnax/CartPole-v1", size)
    memory_of = dataclasses.replace(config.replay, capacity=capacity, train_ratio=32.0)
    config = dataclasses.replace(config, replay=memory_of, envs=_ENVS, save_every=capacity // 8)
    program = train.build(config)
    chunk = program.compile()
    used = memory.estimate(program, chunk, config)
    before = resident_bytes()
    state = jax.block_until_ready(program.init())
    with Saver(folder, config, print) as saver:
        for step in range(1, 6):
            if step == 3:  # the first two have nothing to take over, and are written whole
                _forget_peak()
            rows = (capacity + step * config.save_every) // _ENVS
            cursor = state.clock.cursor._replace(written=jnp.int32(rows))
            state = state._replace(clock=state.clock._replace(cursor=cursor))
            saver.save(step, state)
            state = jax.block_until_ready(chunk(state, 8)[0])  # with four updates
            saver.wait()
    return {"told": sum(used), "taken": _peak() - before, **used._asdict()}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def _peak() -> int:
    """The most bytes that this process has held."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (line,) = [x for x in lines if x.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many sizes; gives the line of results."""
    sizes, broken = {}, []
    for size, capacity in list(CAPACITIES.items())[:count]:
        words = [
            sys.executable,
            "-m",
            "tests.faults.preflight",
            size,
            str(capacity),
            str(folder / size),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        sizes[size] = json.loads(done.stdout.splitlines()[-1])
        off = sizes[size]["told"] / sizes[size]["taken"] - 1
        sizes[size]["off"] = round(off, 3)
        print(size, sizes[size], flush=True)
        broken += [f"{size} is off by {off:.1%}"] if abs(off) > _WITHIN else []
    return {"test": "preflight", "count": count, "sizes": sizes, "broken": broken}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CAPACITIES:
        print(json.dumps(take(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        command(__doc__, len(CAPACITIES), measure)
