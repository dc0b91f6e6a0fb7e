"""Cuts the training of random configurations in two: what comes out is the same bit for bit.

    python -m tests.faults.cuts --count 20 --out benchmarks/results/reliability.jsonl

N iterations, a checkpoint, its restoration and N more, against 2 N in one go: every bit of the
state and of the metrics. Vectors and images, one and several members, rings that wrap and that do
not, any train ratio; one in four has a second checkpoint on the way, which takes over rows.
"""

import collections
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwm import train
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.config import ReplayConfig
from jaxwm.run import checkpoint
from jaxwm.run.saver import Saver
from tests.faults.damage import bits, command

_ENVS = ("toy/Memory", "toy/Pixels", "toy/Reach", "toy/Mixed")
_MOST = 60  # iterations until the cut


def drawn(random: np.random.Generator, env: str) -> RunConfig:
    """A configuration with its numbers drawn."""
    envs, length, batch = (
        int(random.integers(low, high)) for low, high in [(1, 6), (4, 9), (1, 4)]
    )
    every = int(random.choice([x for x in range(1, length + 1) if length % x == 0]))
    rows = -(-int(random.integers(length + 1, 2 * _MOST)) // every) * every  # of each ring
    seeds = int(random.integers(1, 4))
    return RunConfig(
        env=env,
        recipe="dreamer_v3",
        size="debug",
        agent=dreamer_v3.sized("debug"),
        seed=int(random.integers(1000)),
        seeds=seeds,
        sweep=("entropy=1e-4,1e-3",) if random.random() < 0.25 else (),
        envs=envs,
        replay=ReplayConfig(
            capacity=envs * rows,
            batch_size=batch,
            batch_length=length,
            train_ratio=float(random.uniform(0.2, 3.0)),
            online=bool(random.integers(2)),
            context_every=every,
        ),
    )


def same(config: RunConfig, cut: int, twice: bool, folder: Path) -> dict[str, int]:
    """Compares both ways; gives the number of updates, and of leaves that differ."""
    program = train.build(config)
    chunk = program.compile()
    whole, metrics = chunk(program.init(), 2 * cut)
    state, _ = chunk(program.init(), cut)
    with Saver(folder, config, print) as saver:
        if twice:
            state, _ = chunk(program.init(), cut // 3)
            for step in (1, 2):
                saver.save(step, state)
            state, _ = chunk(state, cut - cut // 3, False)
        saver.save(cut + 3, state)
    del state
    restored = checkpoint.restore(folder, program.shapes(), config)
    state, after = chunk(restored, cut, False)
    pairs = zip(*map(jax.tree.leaves, ((whole, metrics), (state, after))), strict=True)
    differ = sum(bits(one) != bits(other) for one, other in pairs)
    return {"updates": int(whole.clock.updates), "differ": differ}


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many pairs of configuration and cut; gives the line of results."""
    random, tally, broken = np.random.default_rng(seed), collections.Counter(), []
    for number in range(count):
        config = drawn(random, _ENVS[number % len(_ENVS)])
        cut = int(random.integers(3, _MOST))
        found = same(config, cut, number % 4 == 3, folder / str(number))
        tally["images"] += config.env == "toy/Pixels"
        tally["several members"] += config.members > 1
        tally["with updates"] += found["updates"] > 0
        tally["wrapped"] += 2 * cut > config.replay.rows_per_env(config.envs)
        print(number, config.env, config.members, cut, found, flush=True)
        if found["differ"]:
            broken.append(f"{found['differ']} leaves differ after {cut} iterations of {config}")
    counts = {name.replace(" ", "_"): value for name, value in tally.items()}
    return {"test": "cuts", "count": count, **counts, "broken": broken}


if __name__ == "__main__":
    command(__doc__, 20, measure)
