"""Optimiser, schedules, returns and the slow critic of Dreamer V2, against recorded tables."""

import re
from typing import Any

import jax.numpy as jnp

from jaxwm.optim import Schedule, slow_copy, value_at
from tests.parity.common import Check, Recorded
from tests.parity.learning import lambda_returns, optimizers


def schedules(recorded: Recorded) -> None:
    """Schedules, which Dreamer V2 writes as text."""
    steps = recorded["schedule/steps"].tolist()
    rows = [[_value(str(text), step) for step in steps] for text in recorded["schedule/strings"]]
    recorded.compare("schedule/values", jnp.asarray(rows))


def _value(text: str, step: int) -> Any:
    kind, *words = re.split(r"[(,)]", text.rstrip(")"))
    if not words:
        return value_at(float(text), step)
    first, second, *rest = map(float, words)
    if kind == "warmup":
        return value_at(Schedule(second, second, warmup=int(first), updates=int(first) + 1), step)
    shape = "exponential" if kind == "exp" else "linear"
    value = value_at(Schedule(first, second, shape, updates=int(rest[0])), step)
    return 1 - 1 / value if kind == "horizon" else value  # a discount from its horizon


def slow(recorded: Recorded) -> None:
    """The slow critic, after each of a few updates of the fast one."""
    for which in recorded.groups(r"slow/(\w+\.\d+)/slow_start"):
        data = recorded.flat(f"slow/{which}/")
        copy = slow_copy(recorded.number(f"slow/{which}/fraction"), int(data["every"]), first=1.0)
        state, seen = copy.init(jnp.asarray(data["slow_start"])), []
        for fast in data["fast"]:
            state = copy.update(state, jnp.asarray(fast))
            seen.append(state.params)
        recorded.compare(f"slow/{which}/slow", jnp.stack(seen))


CHECKS = [
    Check("optimizer", r"opt/\w+/lr", optimizers()),
    Check("schedules", r"schedule/strings", schedules),
    Check("lambda_return", r"lambda/reward", lambda_returns),
    Check("slow_critic", r"slow/\w+\.\d+/slow_start", slow),
]
