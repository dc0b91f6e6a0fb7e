"""EnvPool: simulators in C++ that step as one, many of them in every worker process.

Names are EnvPool's ids. One package covers Atari ("Pong-v5"), the DeepMind Control Suite
("CartpoleSwingup-v1"), classic control ("CartPole-v1"), ProcGen ("CoinrunEasy-v0"), ViZDoom,
MiniGrid and others, each with EnvPool's own defaults, which are not always those of the papers.
Atari alone is played as in `envs.atari`: EnvPool's 84x84 frames, which cannot be halved often
enough, stacks of four of them and its FIRE at the start are options. Pictures of MuJoCo tasks are
left to `envs.dm_control`: where EnvPool cannot draw, it ends its process or hangs.

Observations: pictures (uint8, as height x width x channels) are "image", an integer "index", any
other array "vector", float32; entries of a dict keep their names, nested ones are joined by dots.
EnvPool's time limit cuts an episode, even one that would have ended at that very step; any other
end is final.
"""

# Where the package is not installed, pyright takes `import envpool` for this very file.
# pyright: reportAttributeAccessIssue=false

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxwm.spaces import Box, Discrete, HostEnv, JaxwmError, Space, nearest

# Encoders halve pictures; smaller grids of uint8, such as MiniGrid's 7x7x3, hold codes.
SMALLEST_IMAGE = 32
# Sizes, sticky actions and actions of `atari.AtariConfig`.
ATARI = {
    "img_height": 96,
    "img_width": 96,
    "stack_num": 1,
    "repeat_action_probability": 0.25,
    "full_action_space": True,
    "use_fire_reset": False,
}
# EnvPool and MuJoCo write numbers like these where there is no bound.
UNBOUNDED = 1e9
# What `make` decides itself.
FIXED = {"batch_size", "env_seed", "gym_reset_return_info", "max_num_players", "num_envs", "seed"}


Convert = Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One array of EnvPool's observations, and how jaxwm has it."""

    path: tuple[str, ...]
    space: Space
    convert: Convert  # from a batch of EnvPool's


def names() -> list[str]:
    """The ids of the installed envpool."""
    import envpool

    return sorted(envpool.list_all_envs())


def make(name: str, **options: Any) -> HostEnv:
    """An environment of EnvPool.

    Args:
      name: its id.
      options: arguments of `envpool.make`, such as `max_episode_steps=500`; for Atari those of
        `ATARI` unless they are given. Each worker process steps its share on one thread unless
        `num_threads` says otherwise.

    Returns:
      An environment on the host whose simulators step as one.

    Raises:
      JaxwmError: if the name or an option is unknown, or the environment cannot be used.
    """
    known = names()
    if name not in known:
        raise nearest(name, known, "envpool environment")
    with _quiet():
        if set(ATARI) <= set(_spec(name, {}).config._fields):
            options = {**ATARI, **options}
        entries, (action_space, _) = _interface(name, options)
    obs_space = {key: entry.space for key, entry in entries.items()}
    one = functools.partial(_Simulator, name, options)
    many = functools.partial(_Batch, name, options)
    return HostEnv(f"envpool/{name}", obs_space, action_space, one, many)


def _spec(name: str, options: dict[str, Any]) -> Any:
    """EnvPool's description of an environment."""
    import envpool

    try:
        default = envpool.make_spec(name)
    except ImportError as error:
        # ProcGen without Qt 5, which EnvPool's own words say.
        raise JaxwmError(f"envpool/{name} needs a library of the system. {error}") from error
    except Exception as error:
        raise JaxwmError(f"envpool/{name} cannot be made: {error}") from error
    fields = set(default.config._fields) - FIXED
    for option in options:
        if option not in fields:
            raise nearest(option, fields, f"option of envpool/{name}")
    try:
        return envpool.make_spec(name, **options)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise JaxwmError(f"envpool/{name} cannot be made with {options}: {why}") from error


def _interface(name: str, options: dict[str, Any]) -> tuple[dict[str, Entry], Any]:
    """The observations by jaxwm's names, and what `_action` says of the action."""
    spec = _spec(name, options)
    if getattr(spec.config, "max_num_players", 1) > 1:
        raise JaxwmError(f"envpool/{name} has several players; jaxwm has agents for one.")
    entries = {}
    for path, space in _leaves(spec.observation_space):
        entry = Entry(path, *_observation(space))
        entries[".".join(path) or _kind(entry.space)] = entry
    return entries, _action(name, spec.action_space)


def _leaves(space: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The spaces in nested dicts, with their paths."""
    if not hasattr(space, "spaces"):
        return [(path, space)]
    return [leaf for key, part in space.spaces.items() for leaf in _leaves(part, (*path, key))]


def _kind(space: Space) -> str:
    """The name of a single observation."""
    if isinstance(space, Discrete):
        return "index" if space.shape == () else "vector"
    return "image" if space.dtype == "uint8" else "vector"


def _observation(space: Any) -> tuple[Space, Convert]:
    """jaxwm's space of an observation, and the way from a batch of EnvPool's."""
    shape = tuple(space.shape)
    # Rows take up to three axes.
    flat = shape if len(shape) <= 3 else (int(np.prod(shape)),)
    if hasattr(space, "start"):
        return Discrete(int(space.n)), functools.partial(_integers, shape, -int(space.start))
    if not hasattr(space, "low"):  # yes or no
        return Discrete(2, flat), functools.partial(_integers, flat, 0)
    if space.dtype == np.uint8 and len(shape) == 3 and sorted(shape)[1] >= SMALLEST_IMAGE:
        if shape[0] >= shape[2]:
            return Box(shape, "uint8", 0.0, 255.0), np.asarray
        return Box((*shape[1:], shape[0]), "uint8", 0.0, 255.0), _channels_last
    # Bounds are left out: where there are none, EnvPool writes wrong ones.
    return Box(flat), functools.partial(_floats, flat)


def _action(name: str, space: Any) -> tuple[Space, Convert]:
    """jaxwm's space of the action, and the way from a batch of its actions to EnvPool's."""
    shape = tuple(space.shape)
    if hasattr(space, "start"):
        return Discrete(int(space.n)), functools.partial(_integers, shape, int(space.start))
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    if not (np.abs([low, high]) < UNBOUNDED).all():
        raise JaxwmError(
            f"The actions of envpool/{name} have no bounds, so they cannot be scaled to [-1, 1]. "
            "ViZDoom has classes instead with use_combined_action=True."
        )
    if np.issubdtype(space.dtype, np.integer):
        classes = tuple(int(n) for n in (high - low + 1).ravel())
        convert = functools.partial(_integers, shape, low.astype(np.int32))
        return Discrete(classes[0] if len(set(classes)) == 1 else classes, shape), convert
    return Box(shape, "float32", -1.0, 1.0), functools.partial(_rescale, low, high, space.dtype)


def _integers(shape: tuple[int, ...], by: Any, value: np.ndarray) -> np.ndarray:
    return (np.asarray(value) + by).astype(np.int32).reshape(-1, *shape)


def _floats(shape: tuple[int, ...], value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32).reshape(-1, *shape)


def _channels_last(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, 1, -1)


def _rescale(low: np.ndarray, high: np.ndarray, dtype: Any, value: np.ndarray) -> np.ndarray:
    share = (np.clip(np.asarray(value, np.float64), -1.0, 1.0) + 1.0) / 2.0
    return (low + share * (high - low)).astype(dtype)


class _Batch:
    """Simulators of EnvPool as `worker.Batch`."""

    def __init__(self, name: str, options: dict[str, Any], count: int):
        import envpool

        self._count = count
        self._make = functools.partial(
            envpool.make_gymnasium, name, num_envs=count, **{"num_threads": 1, **options}
        )
        with _quiet():
            self._entries, (_, self._convert) = _interface(name, options)
        self._envs: Any = None

    def reset(self, seed: int) -> dict[str, Any]:
        # EnvPool takes a seed only when it is made, and gives simulator i the seed plus i.
        self.close()
        self._envs = self._make(seed=seed % (2**31 - self._count))
        return self.again()

    def again(self) -> dict[str, Any]:
        """Begins new episodes without a seed; observations (n, ...)."""
        with _quiet():
            obs, _ = self._envs.reset()
        return self._see(obs)

    def step(self, action: Any) -> tuple[dict[str, Any], Any, Any, Any]:
        obs, reward, terminal, cut, _ = self._envs.step(self._convert(action))
        return self._see(obs), reward, terminal, cut

    def _see(self, obs: Any) -> dict[str, Any]:
        return {
            key: entry.convert(functools.reduce(lambda part, k: part[k], entry.path, obs))
            for key, entry in self._entries.items()
        }

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()
            self._envs = None


class _Simulator:
    """One simulator of EnvPool as `types.Simulator`."""

    def __init__(self, name: str, options: dict[str, Any]):
        self._batch = _Batch(name, options, 1)
        self._begun = False

    def reset(self, seed: int | None) -> dict[str, Any]:
        if seed is None and self._begun:
            return _only(self._batch.again())
        self._begun = True
        if seed is None:
            seed = int(np.random.default_rng().integers(2**31))
        return _only(self._batch.reset(seed))

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        obs, reward, terminal, cut = self._batch.step(np.asarray(action)[None])
        return _only(obs), float(reward[0]), bool(terminal[0]), bool(cut[0])

    def close(self) -> None:
        self._batch.close()


def _only(obs: dict[str, Any]) -> dict[str, Any]:
    return {key: x[0] for key, x in obs.items()}


@contextlib.contextmanager
def _quiet():
    """Without gymnasium's warnings about the bounds that EnvPool gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
