"""Rows of experience, spaces, environments and world models: the nouns of the library.

One row (`Step`) holds everything about one moment: the action that led to it, what arrived,
and the flags. Nothing anywhere shifts actions in time. Over the end of an episode:

    row         t=7      t=8 (end)     t=9 (next episode)   t=10
    action      a_6      a_7           0                    a_9
    obs         o_7      o_8           o'_0                 o'_1
    reward      r_7      r_8           0                    r'_1
    is_first    False    False         True                 False
    is_last     False    True          False                False
    is_terminal False    True or not   False                False

`action` is the one that *led* to the row; `reward` was received on arriving. The row with
`is_last` is kept, so the final observation is never lost; the action chosen at it is ignored
and the next row of that environment starts a new episode (the NEXT_STEP convention of
Gymnasium). `is_terminal` is False when the episode was cut by a time limit: the future went
on, nobody looked.

Dimension letters: B batch or environments, T time, H horizon, N imagined trajectories,
D deterministic size, S stochastic groups, K classes, A action, F features, h w c image.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

Key = PRNGKeyArray
Params = PyTree
Metrics = dict[str, Array]


class JaxwmError(ValueError):
    """Bad input, told in one plain paragraph; the command line prints it and exits with 2."""


def nearest(name: str, known: Iterable[str], what: str) -> JaxwmError:
    """The error for an unknown `what` called `name`, with the nearest known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
    return JaxwmError(f"There is no {what} called {name!r}. {hint}")


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays of numbers; a rank-3 uint8 box is an image (height, width, channels).

    Args:
      shape: shape of one element.
      dtype: numpy dtype name; "uint8" at rank 3 means an image in 0..255.
      low: lower bound, one number for all entries or a tuple with one per entry.
      high: upper bound, likewise.
      missing: whether an entry may be absent, marked by -inf (floats).
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    low: float | tuple[float, ...] = -math.inf
    high: float | tuple[float, ...] = math.inf
    missing: bool = False


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Integers 0..classes-1, of any shape.

    Args:
      classes: number of classes, one for all entries or a tuple with one per entry of
        `shape` (multi-discrete).
      shape: shape of one element; () is a single choice.
      missing: whether an entry may be absent, marked by -1.
    """

    classes: int | tuple[int, ...]
    shape: tuple[int, ...] = ()
    missing: bool = False

    @property
    def dtype(self) -> str:
        return "int32"

    @property
    def width(self) -> int:
        """The largest number of classes: the size of the one-hot axis."""
        return self.classes if isinstance(self.classes, int) else max(self.classes)

    def mask(self) -> np.ndarray | None:
        """(*shape, width) booleans of the classes that exist, or None if all do."""
        if isinstance(self.classes, int) or len(set(self.classes)) == 1:
            return None
        counts = np.asarray(self.classes).reshape(self.shape)
        return np.arange(self.width) < counts[..., None]


Space = Box | Discrete
ObsSpace = dict[str, Space]
ActionSpace = Space | dict[str, Space]
Action = Array | dict[str, Array]


def is_image(space: Space) -> bool:
    """Whether a space holds images: uint8 of rank 3."""
    return isinstance(space, Box) and space.dtype == "uint8" and len(space.shape) == 3


def as_dict(entries: Any) -> dict[str, Any]:
    """A dict of action entries (or their spaces); a bare one goes by the name "action"."""
    return dict(entries) if isinstance(entries, Mapping) else {"action": entries}


def zeros(space: Any, lead: tuple[int, ...] = ()) -> Any:
    """Zeros of a space, or of a dict of spaces, with leading axes `lead`."""
    if isinstance(space, Mapping):
        return {name: zeros(part, lead) for name, part in space.items()}
    return jnp.zeros((*lead, *space.shape), space.dtype)


class Step(NamedTuple):
    """One row of experience; leading axes (T, B) in a batch, (B,) from an environment."""

    action: Action
    obs: dict[str, Array]
    reward: Float[Array, "*lead"]
    is_first: Bool[Array, "*lead"]
    is_last: Bool[Array, "*lead"]
    is_terminal: Bool[Array, "*lead"]


def first(action_space: ActionSpace, obs: dict[str, Array]) -> Step:
    """The row that starts an episode: zero action, zero reward."""
    no = jnp.zeros((), bool)
    return Step(zeros(action_space), obs, jnp.zeros(()), ~no, no, no)


def transition(
    action: Action,
    obs: dict[str, Array],
    reward: Any,
    terminal: Any,
    cut: Any = False,
) -> Step:
    """The row reached by `action`; `terminal` ends the episode for good, `cut` at a limit."""
    terminal = jnp.asarray(terminal, bool)
    return Step(
        action=action,
        obs=obs,
        reward=jnp.asarray(reward, jnp.float32),
        is_first=jnp.zeros((), bool),
        is_last=terminal | jnp.asarray(cut, bool),
        is_terminal=terminal,
    )


class Env(NamedTuple):
    """Something to act in, as two pure functions.

    A single environment knows nothing of batches and never resets itself;
    `envs.wrappers.batch` makes the batched, self-resetting one (leading axis B) that the
    training loop steps. Actions of `Box` spaces arrive in [-1, 1] after
    `envs.wrappers.normalize_action`.
    """

    name: str
    obs_space: ObsSpace
    action_space: ActionSpace
    reset: Callable[[Key], tuple[Any, Step]]
    step: Callable[[Any, Any, Key], tuple[Any, Step]]


class Simulator(Protocol):
    """One environment on the host, in numpy. It knows nothing of batches, never resets itself.

    It may raise, hang or take its process down with it: `envs.host` deals with that.
    """

    def reset(self, seed: int | None) -> dict[str, Any]:
        """Begins an episode; returns its first observation. `seed` None: go on at random."""
        ...

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        """Observation, reward, whether the episode ended for good, whether it was cut."""
        ...

    def close(self) -> None:
        """Lets go of windows, files and memory."""
        ...


class HostEnv(NamedTuple):
    """An environment that steps on the host: what it takes and gives, and how to make one.

    `envs.host.Pool` steps many of them in worker processes. Both functions travel there by
    cloudpickle.

    Attributes:
      name: for people.
      obs_space: the space of each observation.
      action_space: one space or a dict of them; boxes are float32 in [-1, 1].
      open: makes one simulator.
      batch: makes `count` simulators that step as one (`envs.worker.Batch`), where the package has
        its own way to step many; None: one after the other.
    """

    name: str
    obs_space: ObsSpace
    action_space: ActionSpace
    open: Callable[[], Simulator]
    batch: Callable[[int], Any] | None = None


class Latent(NamedTuple):
    """The state of a recurrent state-space model; leading axes (), (B,), (T, B) or (H+1, N)."""

    deter: Float[Array, "*lead D"]
    stoch: Float[Array, "*lead S K"]


class WorldModel(NamedTuple):
    """What is learned about the world, as pure functions of explicit parameters.

    Every random draw is an argument: `noise` gives the standard Gumbel (or normal) draws for
    some leading axes, all of them in one operation outside any scan.

    Attributes:
      init: `key -> params`.
      initial: `batch size -> carry`, the latent before anything was seen.
      noise: `key, lead -> noise` for the latents of shape `lead`.
      observe: `params, carry, steps (T, B), noise (T, B) -> latents (T, B), posterior logits`.
        Filters a real sequence; `is_first` rows forget the carry.
      imagine: `params, start (N,), policy, noise (H, N), policy noise (H, N) -> latents
        (H+1, N), actions (H, N)`; row 0 is `start`, action i is drawn at latent i.
      predict: `params, latents -> {obs key | "reward" | "continue": distribution}`.
      loss: `params, carry, steps, noise -> {name: loss (T, B)}, latents, metrics`.
      features: `latent -> (..., F)`, what heads read.
    """

    init: Callable[..., Params]
    initial: Callable[..., Latent]
    noise: Callable[..., Any]
    observe: Callable[..., Any]
    imagine: Callable[..., Any]
    predict: Callable[..., Any]
    loss: Callable[..., Any]
    features: Callable[[Latent], Array]


class Behavior(NamedTuple):
    """How to act with a world model, as pure functions.

    Attributes:
      init: `key -> params`.
      initial: `() -> state`, the running statistics it keeps.
      noise: `key, lead -> noise` for actions of shape `lead`.
      policy: `params, features (..., F) -> {action key: distribution}`.
      value: `params, features (..., F) -> distribution` of the return from there.
      act: `params, features (..., F), noise -> action`.
      loss: see `behaviors.actor_critic`.
    """

    init: Callable[..., Params]
    initial: Callable[[], Any]
    noise: Callable[..., Any]
    policy: Callable[..., dict[str, Any]]
    value: Callable[..., Any]
    act: Callable[..., Action]
    loss: Callable[..., Any]


__all__ = [
    "Action",
    "ActionSpace",
    "Array",
    "Behavior",
    "Bool",
    "Box",
    "Discrete",
    "Env",
    "Float",
    "HostEnv",
    "Int",
    "JaxwmError",
    "Key",
    "Latent",
    "Metrics",
    "ObsSpace",
    "Params",
    "PyTree",
    "Simulator",
    "Space",
    "Step",
    "WorldModel",
    "as_dict",
    "first",
    "is_image",
    "nearest",
    "transition",
    "zeros",
]
