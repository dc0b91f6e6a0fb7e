"""Crafter, the original in Python: a world to survive in, with 22 achievements to unlock.

"reward" pays for achievements and health as in the benchmark, "noreward" pays nothing. Dying is
a true end, the limit of 10,000 steps is a cut. `envs.craftax` has the same game in JAX.
"""

import collections
import functools
import importlib.util
from typing import Any

from jaxwm.spaces import Box, Discrete, HostEnv, JaxwmError, nearest

NAMES = ("reward", "noreward")
_VIEW = 9  # squares along a side of the picture


def names() -> list[str]:
    """The two variants of the game.

    Raises:
      ModuleNotFoundError: if crafter is not installed.
    """
    if importlib.util.find_spec("crafter") is None:
        raise ModuleNotFoundError("No module named 'crafter'", name="crafter")
    return list(NAMES)


def make(name: str, size: int = 64, length: int = 10_000, area: int = 64) -> HostEnv:
    """Crafter.

    Args:
      name: "reward" or "noreward".
      size: side of the pictures, at least 9.
      length: steps after which an episode is cut.
      area: side of the world in squares, at least 9.

    Returns:
      An environment on the host; its observation is "image".

    Raises:
      JaxwmError: if the name is unknown or a number is too small.
    """
    if name not in NAMES:
        raise nearest(name, NAMES, "crafter environment")
    for what, value, least in (("size", size, _VIEW), ("area", area, _VIEW), ("length", length, 1)):
        if value < least:
            raise JaxwmError(f"Crafter's {what} must be at least {least}, but it is {value}.")
    import crafter

    factory = functools.partial(_Simulator, name == "reward", size, length, area)
    image = Box((size, size, 3), "uint8", 0.0, 255.0)
    actions = Discrete(len(crafter.Env().action_names))
    return HostEnv(f"crafter/{name}", {"image": image}, actions, factory)


class _Ordered(dict):
    """A set that keeps the order in which things were added."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


class _Simulator:
    """Crafter as `types.Simulator`."""

    def __init__(self, reward: bool, size: int, length: int, area: int):
        import crafter

        self._make = functools.partial(
            crafter.Env, area=(area, area), size=(size, size), reward=reward, length=length
        )
        self._env: Any = None

    def reset(self, seed: int | None) -> dict[str, Any]:
        if seed is not None or self._env is None:
            self._env = self._make(seed=seed)
        image = self._env.reset()
        _order(self._env._world)
        return {"image": image}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        image, reward, done, info = self._env.step(int(action))
        terminal = info["discount"] == 0
        return {"image": image}, float(reward), terminal, bool(done) and not terminal

    def close(self) -> None:
        """The game holds nothing but memory."""


def _order(world: Any) -> None:
    """Lets the seed alone determine the course of the game.

    Crafter keeps the creatures of each part of the world in sets, and picks the one to vanish by
    its place in them: by its address in memory, so that two games of the same seed soon differ.
    """
    chunks = {key: _Ordered() for key in world.chunks}
    for thing in world.objects:
        chunks[world.chunk_key(thing.pos)].add(thing)
    world._chunks = collections.defaultdict(_Ordered, chunks)
