"""Gymnasium environments, and anybody's own that follow its interface; they step on the host.

Observations: an image (uint8, height x width x 1 or 3) is "image", any other array "vector", an
integer "index"; the entries of a Dict keep their names, those of a Tuple are numbered, and nested
ones are joined by dots. Actions: Discrete, MultiDiscrete and MultiBinary (classes of 2) are
classes, boxes lie in [-1, 1], Dicts and Tuples become dicts. `truncated` cuts an episode,
`terminated` ends it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxwm.spaces import Box, Discrete, HostEnv, JaxwmError, Space, nearest

# Asks for an environment's own way to step many at once.
_VECTOR = ":vector"


def names() -> list[str]:
    """The registered ids of the installed gymnasium."""
    import gymnasium

    return sorted(gymnasium.registry)


def make(name: str, **options: Any) -> HostEnv:
    """A registered Gymnasium environment.

    Args:
      name: its id, such as "CartPole-v1"; with ":vector" after it, many step as one by the
        environment's own vector implementation (`vector_entry_point`), where it has one.
      options: arguments of `gymnasium.make`.

    Returns:
      An environment on the host.

    Raises:
      JaxwmError: if there is no such id, it cannot be made, or has spaces that jaxwm cannot take.
    """
    import gymnasium

    base = name.removesuffix(_VECTOR)
    if ":" in base:
        raise JaxwmError(
            f"gymnasium/{base} would import the module {base.partition(':')[0]}. Give a function "
            "of that module that makes the environment instead, on the command line: "
            "--env module:function."
        )
    if base not in gymnasium.registry:
        raise nearest(base, names(), "gymnasium environment")
    if base != name:
        if gymnasium.registry[base].vector_entry_point is None:
            raise JaxwmError(
                f"{base} has no vector implementation of its own. Leave out ':vector'."
            )
        many = functools.partial(_Vector, base, options)
        return adapt(f"gymnasium/{name}", functools.partial(_make, base, options), many)
    return adapt(f"gymnasium/{name}", functools.partial(_make, base, options))


def adapt(
    name: str, factory: Callable[[], Any], batch: Callable[[int], Any] | None = None
) -> HostEnv:
    """The `HostEnv` of anything with Gymnasium's interface.

    Args:
      name: for people.
      factory: makes one `gymnasium.Env`; it travels to worker processes by cloudpickle.
      batch: see `HostEnv.batch`.

    Raises:
      JaxwmError: if the factory raises, or gives spaces that jaxwm cannot take.
    """
    try:
        env = factory()
        env.close()
    except Exception as error:
        raise JaxwmError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    for what in ("observation_space", "action_space"):
        if getattr(env, what, None) is None:
            raise JaxwmError(f"{name} has no {what}. Set it to a gymnasium space in __init__.")
    obs = flatten(f"The observation of {name}", env.observation_space)
    action = flatten(f"The action of {name}", env.action_space, action=True)
    spaces: Any = action[""] if list(action) == [""] else action
    return HostEnv(name, _named(obs), spaces, functools.partial(_Simulator, factory), batch)


def flatten(what: str, space: Any, action: bool = False) -> dict[str, Space]:
    """The entries of a gymnasium space by name; a bare one has the name "".

    Args:
      what: whose it is, for messages.
      space: any of gymnasium's spaces but Text, Graph, Sequence and OneOf.
      action: whether it is an action, whose boxes are shown as [-1, 1].

    Raises:
      JaxwmError: if a space cannot be taken.
    """
    return {name: _space(f"{what}{name and f' ({name})'}", s, action) for name, s in _leaves(space)}


def _leaves(space: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The spaces that are not Dicts or Tuples, with their paths."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        named = parts.items() if isinstance(parts, dict) else enumerate(parts)
        return [x for key, part in named for x in _leaves(part, f"{prefix}{key}.")]
    return [(prefix.removesuffix("."), space)]


def _space(what: str, space: Any, action: bool) -> Space:
    """The space of a gymnasium space that has no parts."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if isinstance(space, spaces.MultiBinary):
        return Discrete(2, tuple(space.shape))
    if isinstance(space, spaces.MultiDiscrete):
        classes = tuple(int(n) for n in space.nvec.ravel())
        same = len(set(classes)) == 1
        return Discrete(classes[0] if same else classes, tuple(space.shape))
    if not isinstance(space, spaces.Space):
        raise JaxwmError(f"{what} is a {type(space).__name__}, but a gymnasium space is expected.")
    if not isinstance(space, spaces.Box):
        raise JaxwmError(
            f"{what} is a {type(space).__name__}, which has no fixed shape. Box, Discrete, "
            "MultiDiscrete, MultiBinary, and Dict or Tuple of these can be used."
        )
    shape, low, high = tuple(space.shape), space.low, space.high
    if action:
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise JaxwmError(
                f"{what} is a Box with an infinite bound, so it cannot be scaled to [-1, 1]. Give "
                "it finite bounds, or squash the action inside the environment."
            )
        return Box(shape, "float32", -1.0, 1.0)
    if space.dtype == np.uint8 and len(shape) == 3:
        return Box(shape, "uint8", 0.0, 255.0)
    return Box(shape, "float32", _bound(low), _bound(high))


def _bound(values: np.ndarray) -> float | tuple[float, ...]:
    # The largest number of a type often stands for "no bound".
    values = np.asarray(values, np.float64)
    values = np.where(np.abs(values) > 1e38, np.copysign(np.inf, values), values)
    flat = values.ravel().tolist()
    return flat[0] if len(set(flat)) == 1 else tuple(flat)


def _named(entries: dict[str, Space]) -> dict[str, Space]:
    """Observations, a bare one under the name of its kind."""
    if list(entries) != [""]:
        return entries
    (space,) = entries.values()
    if isinstance(space, Discrete):
        return {"index" if space.shape == () else "vector": space}
    return {"image" if space.dtype == "uint8" else "vector": space}


def _make(base: str, options: dict[str, Any]) -> Any:
    import gymnasium

    return gymnasium.make(base, **options)


class _Simulator:
    """A gymnasium environment as `types.Simulator`; what breaks gymnasium's rules is told."""

    def __init__(self, factory: Callable[[], Any]):
        self._env = factory()
        self._spaces = self._env.observation_space, self._env.action_space

    def reset(self, seed: int | None) -> dict[str, Any]:
        try:
            out = self._env.reset(seed=seed)
        except TypeError as error:
            if "seed" not in str(error):
                raise
            raise JaxwmError(
                f"reset does not take a seed ({error}). Write reset(self, *, seed=None, "
                "options=None)."
            ) from error
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
            raise JaxwmError(
                f"reset returned {_shown(out)}, but a pair is expected: the observation and a dict."
            )
        return self._look("reset", out[0])

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        out = self._env.step(nested(self._spaces[1], action))
        if not (isinstance(out, tuple) and len(out) == 5):
            raise JaxwmError(
                f"step returned {_shown(out)}, but five things are expected: observation, reward, "
                "terminated, truncated, info."
            )
        obs, reward, *ends, _ = out
        for what, end in zip(("terminated", "truncated"), ends, strict=True):
            if not isinstance(end, bool | np.bool_):
                raise JaxwmError(f"step returned {what} as {end!r}, but True or False is expected.")
        return self._look("step", obs), reward, bool(ends[0]), bool(ends[1])

    def _look(self, what: str, obs: Any) -> dict[str, Any]:
        try:
            return entries(self._spaces[0], obs)
        except (KeyError, IndexError, TypeError) as error:
            raise JaxwmError(
                f"{what} returned the observation {_shown(obs)}, which is not nested as its space "
                f"{self._spaces[0]} is ({type(error).__name__}: {error})."
            ) from error

    def close(self) -> None:
        self._env.close()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


class _Vector:
    """A gymnasium vector environment as `worker.Batch`."""

    def __init__(self, base: str, options: dict[str, Any], count: int):
        import gymnasium

        mode = gymnasium.vector.AutoresetMode.NEXT_STEP
        self._env = gymnasium.make_vec(base, count, "vector_entry_point", **options)
        found = self._env.metadata.get("autoreset_mode")
        if found != mode:
            raise JaxwmError(f"{base}'s vector implementation resets by {found}, not {mode}.")
        self._spaces = self._env.single_observation_space, self._env.single_action_space

    def reset(self, seed: int) -> dict[str, Any]:
        obs, _ = self._env.reset(seed=seed)
        return entries(self._spaces[0], obs)

    def step(self, action: Any) -> tuple[dict[str, Any], Any, Any, Any]:
        value = nested(self._spaces[1], action)
        obs, reward, terminated, truncated, _ = self._env.step(value)
        return entries(self._spaces[0], obs), reward, terminated, truncated

    def close(self) -> None:
        self._env.close()


def entries(space: Any, value: Any) -> dict[str, Any]:
    """An observation of a gymnasium space by the names of its parts, classes counted from 0.

    Args:
      space: the space of one observation.
      value: one observation, or a batch of them, nested as the space is.
    """
    found = _parts(space, value, "")
    if list(found) == [""]:
        return {next(iter(_named(flatten("", space)))): found[""]}
    return found


def _parts(space: Any, value: Any, prefix: str) -> dict[str, Any]:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        named = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        parts = [_parts(part, value[key], f"{prefix}{key}.") for key, part in named]
        return {name: x for part in parts for name, x in part.items()}
    start = getattr(space, "start", 0)
    return {prefix.removesuffix("."): value if np.all(start == 0) else value - start}


def nested(space: Any, action: Any) -> Any:
    """What a gymnasium environment takes, from an action as agents give it.

    Args:
      space: the space of one action.
      action: one action, or a batch of them; a dict by name if the space has parts.
    """
    given = action if isinstance(action, dict) else {"": action}
    return _nest(space, given, "")


def _nest(space: Any, given: dict[str, Any], prefix: str) -> Any:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {key: _nest(x, given, f"{prefix}{key}.") for key, x in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_nest(x, given, f"{prefix}{i}.") for i, x in enumerate(space.spaces))
    value = np.asarray(given[prefix.removesuffix(".")])
    if not isinstance(space, spaces.Box):
        return (value + getattr(space, "start", 0)).astype(space.dtype)
    value = np.clip(value, -1.0, 1.0)
    return (space.low + (value + 1.0) / 2.0 * (space.high - space.low)).astype(space.dtype)
