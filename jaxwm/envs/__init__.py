"""Environments by name: `make("gymnax/CartPole-v1")`.

Like the package itself, this loads nothing: names arrive from `envs.catalog` when they are first
used. A worker process that runs simulators imports their adapter, and with it not even jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxwm.envs.catalog import EXTRAS, OWN, SUITES, is_own, load, make, names, own
    from jaxwm.envs.check import validate

__all__ = ["EXTRAS", "OWN", "SUITES", "is_own", "load", "make", "names", "own", "validate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "check" if name == "validate" else "catalog"
        return getattr(importlib.import_module(f"jaxwm.envs.{home}"), name)
    raise AttributeError(f"module 'jaxwm.envs' has no attribute {name!r}")
