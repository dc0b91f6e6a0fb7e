"""Optimiser and schedules of PlaNet, against recorded tables."""

import re

import jax.numpy as jnp

from jaxwm.optim import Schedule, value_at
from tests.parity.common import Check, Recorded
from tests.parity.learning import optimizers


def schedules(recorded: Recorded) -> None:
    """Ramps from 0 to 1 in so many steps, or from 1 towards 0 down to a smallest value."""
    steps = recorded["schedule/steps"].tolist()
    for name in recorded.names(r"schedule/ramp.*"):
        duration, least = re.fullmatch(r"schedule/ramp(-?\d+)(?:_min([\d.]+))?", name).groups()
        duration, least = int(duration), float(least or 0)
        if duration == 0:
            ramp = 1.0
        elif duration > 0:
            ramp = Schedule(0.0, 1.0, updates=duration)
        else:  # as steep as if it went on to 0
            ramp = Schedule(1.0, least, updates=round((1 - least) * -duration))
        recorded.compare(name, jnp.asarray([value_at(ramp, step) for step in steps]))


CHECKS = [
    Check("optimizer", r"opt/\w+/lr", optimizers()),
    Check("schedules", r"schedule/ramp.*", schedules),
]
