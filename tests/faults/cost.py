"""What safety costs: a save at the run's interval, and the watch for what is not finite.

    python -m tests.faults.cost --count 10 --out benchmarks/results/reliability.jsonl

The demo's training in turns of about ten seconds. Every other turn begins with a save, which is
written while the turn goes on: what such a turn takes longer, over what the training takes from one
save to the next. Likewise with the watch over losses and gradient and without it, as two programs
from the same state.
"""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import train
from jaxwm.recipes import dreamer_v3
from jaxwm.run.saver import Saver
from jaxwm.train.state import Account
from tests.faults.damage import command

_SAVING, _WATCH = 0.05, 0.01  # what they may cost, as shares of the training
_STEPS = 1_000  # of a turn
CONFIG = dreamer_v3.config(preset="cartpole")


def unwatched(metrics: Any, account: Any, health: Any, updates: Any, policy: str) -> Any:
    """`learn.watch` as it would be if it looked at nothing."""
    sums = jax.tree.map(lambda total, x: total + x, account.sums, metrics)
    return jnp.ones((), bool), Account(account.taken + 1, sums), health


def turn(chunk: train.Chunk, state: Any, count: int) -> tuple[Any, float]:
    """The state after so many iterations, and the seconds they took."""
    begun = time.perf_counter()
    state = jax.block_until_ready(chunk(state, count)[0])
    return state, time.perf_counter() - begun


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many turns of each kind; gives the line of results."""
    program = train.build(CONFIG)
    watched = program.compile()
    with (
        mock.patch("jaxwm.train.learn.watch", unwatched),
        mock.patch("jaxwm.train.learn.if_taken", lambda taken, after, before: after),
    ):
        plain = train.build(CONFIG).compile()
    iterations = _STEPS // CONFIG.envs
    state, _ = turn(watched, program.init(), 2 * iterations + program.replay.warmup)
    times: dict[str, list[float]] = {"watched": [], "plain": [], "saved": [], "unsaved": []}
    for number in range(count):
        for kind in sorted(["watched", "plain"], reverse=bool(number % 2)):
            chunk = watched if kind == "watched" else plain
            state, seconds = turn(chunk, state, iterations)
            times[kind].append(seconds)
    with Saver(folder, CONFIG, print) as saver:
        for step in (1, 2):  # programs are compiled, and there is something to take over
            saver.save(step, state)
            state, _ = turn(watched, state, iterations)
        for number in range(count):
            for kind in sorted(["saved", "unsaved"], reverse=bool(number % 2)):
                begun = time.perf_counter()
                if kind == "saved":
                    saver.save(3 + number, state)
                state, _ = turn(watched, state, iterations)
                saver.wait()
                times[kind].append(time.perf_counter() - begun)
    median = {kind: float(np.median(x)) for kind, x in times.items()}
    each = median["saved"] - median["unsaved"]
    interval = median["unsaved"] * CONFIG.save_every / _STEPS
    watch = median["watched"] / median["plain"] - 1
    broken = [f"saving costs {each / interval:.1%}"] if each / interval > _SAVING else []
    broken += [f"the watch costs {watch:.1%}"] if watch > _WATCH else []
    return {
        "test": "cost",
        "count": count,
        "save_seconds": round(each, 3),
        "interval_seconds": round(interval, 1),
        "saving": round(each / interval, 4),
        "watch": round(watch, 4),
        "turns": {kind: [round(x, 3) for x in values] for kind, values in times.items()},
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 10, measure)
