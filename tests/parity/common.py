"""What every parity check shares: files, comparisons, and which arrays have been used.

A check is a function of a `Recorded`. It reads inputs with `recorded[name]` and compares results
with `recorded.compare(name, ours)`. Nothing raises on a mismatch: `recorded.wrong` collects all of
them, so one run shows every array that differs. `run` keeps the outcome of each check, so that a
test can ask which arrays of a file no check has used.

    CHECKS = [
        Check("gru", r"gru/x", gru),      # runs on every file that has an array of that name
    ]
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# The READMEs of the arrays ask for these, relative to the largest entry of an array.
FORWARD, LOSS, GRADIENT = 2e-5, 1e-5, 2e-4


class Check(NamedTuple):
    """A check of the files that hold an array whose whole name matches `marker`."""

    topic: str
    marker: str
    function: Callable[["Recorded"], None]

    def applies(self, names: Any) -> bool:
        return any(re.fullmatch(self.marker, name) for name in names)


class Recorded(Mapping[str, np.ndarray]):
    """The arrays of one file, with notes on what was read, compared and wrong."""

    def __init__(self, path: Path):
        self.path = path
        self._arrays = _load(path)
        self.read: set[str] = set()
        self.compared: set[str] = set()
        self.wrong: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        """An input; a result belongs in `compare`."""
        value = self._arrays[name]
        self.read.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, which does not count as having read it."""
        return self._arrays[name].shape

    def peek(self, name: str) -> np.ndarray:
        """An array, without having read it: for results that a check needs to find its settings."""
        return self._arrays[name]

    def number(self, name: str) -> float:
        """A scalar setting, rounded back to the decimal that float32 cut off."""
        return float(np.format_float_positional(np.float32(self[name]), unique=True))

    def text(self, name: str) -> str:
        return str(self[name])

    def names(self, pattern: str) -> list[str]:
        """The names that match a pattern as a whole, in the order of the file."""
        return [name for name in self._arrays if re.fullmatch(pattern, name)]

    def groups(self, pattern: str) -> list[str]:
        """The distinct first groups of the names that match a pattern as a whole."""
        found = (re.fullmatch(pattern, name) for name in self._arrays)
        return list(dict.fromkeys(match[1] for match in found if match))

    def flat(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under a prefix, by the rest of their names."""
        names = [name for name in self._arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): self[name] for name in names}

    def tree(self, prefix: str, path_of: Callable[[str], str] = str) -> dict[str, Any]:
        """The arrays under a prefix as nested dicts, split at slashes.

        Args:
          prefix: for example "params/".
          path_of: turns the rest of a recorded name into a path in our tree.
        """
        return nested(self.flat(prefix), path_of)

    def compare(self, name: str, ours: Any, tolerance: float | None = None) -> None:
        """Notes an error if `ours` differs from the recorded array `name`; none if there is none.

        Integers and booleans must be equal. Of numbers the largest error counts, relative to the
        largest entry recorded; an array of zeros must be zero.

        Args:
          name: of an array in the file.
          ours: what we compute, of the same shape.
          tolerance: largest relative error; by default what the READMEs ask for.
        """
        if name not in self._arrays:
            return
        want, have = self._arrays[name], np.asarray(ours)
        self.compared.add(name)
        if have.shape != want.shape:
            self.wrong.append(f"{name}: shape {have.shape}, recorded {want.shape}")
        elif want.dtype.kind in "biuSU":
            if not np.array_equal(have, want):
                self.wrong.append(f"{name}: not equal")
        else:
            allowed = tolerance_of(name) if tolerance is None else tolerance
            error = relative_error(have, want)
            if not error <= allowed:  # NaN is wrong too
                self.wrong.append(f"{name}: {error:.1e}, allowed {allowed:.0e}")

    def at_most(self, name: str, ours: float, limit: float) -> None:
        """Notes an error if a number that should be small is not, recorded or ours."""
        self.compared.add(name)
        if not max(float(self._arrays[name]), float(ours)) <= limit:
            self.wrong.append(f"{name}: {float(ours):.1e}, allowed {limit:.0e}")

    def compare_tree(
        self,
        prefix: str,
        ours: Any,
        path_of: Callable[[str], str] = str,
        tolerance: float | None = None,
    ) -> None:
        """Compares every array under a prefix with the leaf of our tree in its place."""
        for name in [name for name in self._arrays if name.startswith(prefix)]:
            self.compare(name, pick(ours, path_of(name.removeprefix(prefix))), tolerance)


def nested(flat: Mapping[str, Any], path_of: Callable[[str], str] = str) -> dict[str, Any]:
    """Nested dicts from arrays by recorded name. Differentiable: gradients have recorded names too.

    Args:
      flat: arrays by name.
      path_of: turns a name into a path in our tree, with slashes.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = path_of(name).split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        assert leaf not in node, f"two recorded arrays have the path of {name}"
        node[leaf] = jnp.asarray(value)
    return tree


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    """Largest error, in units of the largest entry of `want`."""
    have, want = have.astype(np.float64), want.astype(np.float64)
    error = np.abs(have - want).max(initial=0.0)
    return float(error / max(np.abs(want).max(initial=0.0), 1e-12))


def tolerance_of(name: str) -> float:
    """What the READMEs of the arrays ask for."""
    if re.match(r"(.*/)?grad", name):
        return GRADIENT
    return LOSS if re.search(r"loss", name) else FORWARD


def pick(tree: Any, path: str) -> Any:
    """The leaf of nested dicts at a path of names with slashes."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


def renamed(rules: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """A function from recorded names to our paths: the first rule whose pattern matches.

    Args:
      rules: (pattern of a whole name, replacement with groups).
    """

    def path_of(name: str) -> str:
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(replacement)
        raise KeyError(f"the recorded parameter {name} has no place in our tree")

    return path_of


@functools.cache
def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def names(path: Path) -> list[str]:
    """The names of the arrays of a file."""
    return list(_load(path))


@functools.cache
def _outcome(path: Path, check: Check) -> tuple[Recorded, BaseException | None]:
    recorded = Recorded(path)
    try:
        check.function(recorded)
    except Exception as error:
        return recorded, error
    return recorded, None


def run(path: Path, check: Check) -> None:
    """Runs a check of a file, once a session, and asserts that nothing was wrong."""
    recorded, error = _outcome(path, check)
    if error is not None:
        raise error
    assert not recorded.wrong, "\n".join(recorded.wrong)
    assert recorded.compared or recorded.read, f"{check.topic} has used nothing of {path.name}"


def used(path: Path, checks: list[Check]) -> tuple[set[str], set[str]]:
    """The names that the checks of a file have read, and those that they have compared."""
    read, compared = set(), set()
    for check in checks:
        if check.applies(_load(path)):
            recorded, _ = _outcome(path, check)
            read |= recorded.read
            compared |= recorded.compared
    return read, compared
