"""Which environments there are, and how they are made by name.

A name is `suite/environment`. Each suite is one module with `make` and `names`, and imports
its package only when one of its environments is made. Environments of one's own go by
`module:function` once `load` has imported them.
"""

import importlib
from typing import Any

from jaxwm.envs import (
    atari,
    brax,
    craftax,
    crafter,
    dm_control,
    envpool,
    gymnasium,
    gymnax,
    playground,
    toy,
)
from jaxwm.types import Env, HostEnv, JaxwmError, nearest

SUITES: dict[str, Any] = {
    "atari": atari,
    "brax": brax,
    "craftax": craftax,
    "crafter": crafter,
    "dm_control": dm_control,
    "envpool": envpool,
    "gymnasium": gymnasium,
    "gymnax": gymnax,
    "playground": playground,
    "toy": toy,
}
# Suites whose packages jaxwm does not bring along: the extras that do.
EXTRAS = ("atari", "craftax", "crafter", "dm_control", "envpool", "playground")
# Environments of the user's own, by the names under which `load` found them.
OWN: dict[str, Env | HostEnv] = {}


def names() -> dict[str, list[str]]:
    """The environments of each suite; an empty list where its package is not installed."""

    def of(module):
        try:
            return module.names()
        except ModuleNotFoundError:
            return []

    return {suite: of(module) for suite, module in SUITES.items()}


def make(name: str, **options: Any) -> Env | HostEnv:
    """A single environment by name, with actions in [-1, 1] and its usual time limit.

    Args:
      name: `suite/environment`, such as "toy/Memory" or "gymnasium/CartPole-v1"; or the
        `module:function` of an environment that `load` has imported.
      options: passed on to the suite.

    Returns:
      A single environment; `envs.wrappers.batch` makes the batched one.

    Raises:
      JaxwmError: if the name is unknown, or the package of its suite is not installed.
    """
    if name in OWN:
        return OWN[name]
    suite, slash, rest = name.partition("/")
    if is_own(name):
        raise JaxwmError(
            f"{name} would import the module {suite.partition(':')[0]}, which happens only where "
            "you name it yourself: give --env, or call jaxwm.envs.load first."
        )
    if not slash:
        known = [f"{suite}/{env}" for suite, envs in names().items() for env in envs]
        raise nearest(name, known, "environment")
    if suite not in SUITES:
        raise nearest(suite, SUITES, "environment suite")
    try:
        return SUITES[suite].make(rest, **options)
    except ModuleNotFoundError as error:
        # jaxwm depends on the packages of the other suites; they are missing only by accident.
        package = f"'jaxwm[{suite}]'" if suite in EXTRAS else error.name
        raise JaxwmError(
            f"{name} needs the package {error.name!r}, which is not installed. "
            f"Install it: pip install {package}"
        ) from error


def is_own(name: str) -> bool:
    """Whether a name has the form `module:function`, for an environment of the user's own."""
    return ":" in name and "/" not in name


def load(name: str) -> Env | HostEnv:
    """Imports an environment of the user's own, and lets `make` find it from then on.

    Importing runs the module's code, so this is for names typed by the user, never for names
    read from a file.

    Args:
      name: `module:attribute`, importable: a function without arguments (or a class) that gives
        a `types.Env`, a `types.HostEnv` or a Gymnasium environment.

    Returns:
      The environment.

    Raises:
      JaxwmError: if there is no such module or attribute, or it gives something else.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise JaxwmError(
            f"{name} is not there: {error}. Give module:function, from a folder that Python "
            "searches (PYTHONPATH)."
        ) from None
    OWN[name] = own(factory, name)
    return OWN[name]


def own(factory: Any, name: str | None = None) -> Env | HostEnv:
    """An environment of the user's own, ready to be trained in.

    Args:
      factory: a function without arguments (or a class) that gives a `types.Env`, a
        `types.HostEnv` or a Gymnasium environment. In the last case every worker process calls
        it, so it must not refer to anything that cannot be pickled.
      name: for people; by default the factory's own.

    Raises:
      JaxwmError: if it raises, or gives something else.
    """
    name = str(name or getattr(factory, "__name__", "environment"))
    if not callable(factory):
        raise JaxwmError(f"{name} is {factory!r}, but a function or a class is expected.")
    try:
        made = factory()
    except Exception as error:
        raise JaxwmError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    if isinstance(made, Env | HostEnv):
        return made
    if not (callable(getattr(made, "reset", None)) and callable(getattr(made, "step", None))):
        raise JaxwmError(
            f"{name} returns {type(made).__name__}, but a jaxwm.types.Env, a HostEnv or a "
            "Gymnasium environment is expected."
        )
    return gymnasium.adapt(name, factory)
