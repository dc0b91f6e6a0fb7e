"""Environments by name: `make("gymnax/CartPole-v1")`.

A name is `suite/environment`. Each suite is one module with `make` and `names`, and imports
its package only when one of its environments is made.
"""

from typing import Any

from jaxwm.envs import brax, gymnax, toy
from jaxwm.envs.check import validate
from jaxwm.types import Env, JaxwmError, nearest

SUITES = {"brax": brax, "gymnax": gymnax, "toy": toy}
PACKAGES = {"brax": "brax", "gymnax": "gymnax six"}


def names() -> dict[str, list[str]]:
    """The environments of each suite; an empty list where its package is not installed."""

    def of(module):
        try:
            return module.names()
        except ModuleNotFoundError:
            return []

    return {suite: of(module) for suite, module in SUITES.items()}


def make(name: str, **options: Any) -> Env:
    """A single environment by name, with actions in [-1, 1] and its usual time limit.

    Args:
      name: `suite/environment`, such as "toy/Memory" or "gymnax/CartPole-v1".
      options: passed on to the suite.

    Returns:
      A single environment; `envs.wrappers.batch` makes the batched one.

    Raises:
      JaxwmError: if the name is unknown, or the package of its suite is not installed.
    """
    suite, slash, rest = name.partition("/")
    if not slash:
        known = [f"{suite}/{env}" for suite, envs in names().items() for env in envs]
        raise nearest(name, known, "environment")
    if suite not in SUITES:
        raise nearest(suite, SUITES, "environment suite")
    try:
        return SUITES[suite].make(rest, **options)
    except ModuleNotFoundError as error:
        raise JaxwmError(
            f"{name} needs the package {error.name!r}, which is not installed. "
            f"Install it: pip install {PACKAGES[suite]}"
        ) from error


__all__ = ["SUITES", "make", "names", "validate"]
