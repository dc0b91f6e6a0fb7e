"""Spaces, environments outside jax, and the error of the library: what needs no jax.

Worker processes of simulators import this and never jax, which would cost each of them a second
and a hundred megabytes. Everybody else finds these names in `jaxwm.types`.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


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


def is_image(space: Space) -> bool:
    """Whether a space holds images: uint8 of rank 3."""
    return isinstance(space, Box) and space.dtype == "uint8" and len(space.shape) == 3


def as_dict(entries: Any) -> dict[str, Any]:
    """A dict of action entries (or their spaces); a bare one goes by the name "action"."""
    return dict(entries) if isinstance(entries, Mapping) else {"action": entries}


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
