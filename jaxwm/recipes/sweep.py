"""Members: what trains side by side in one program, one per seed and swept setting.

A sweep names entries of the agent's configuration and the values each should take:

    learning_rate=1e-5,4e-5 entropy=1e-4,3e-4

makes four settings, and with two seeds eight members. Members lie setting by setting, each with
all its seeds. In the program a swept entry is an array over members, so all settings share one
compiled program; what would change the program's form, such as a size, cannot be swept.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxwm.config import flatten, require, unchecked
from jaxwm.spaces import nearest

T = TypeVar("T")

_ROOT = "agent."


def parse(sweep: tuple[str, ...], config: Any) -> dict[str, tuple[float, ...]]:
    """The values that each swept entry takes, by its dotted path.

    Args:
      sweep: words "NAME=VALUE,VALUE,..."; the end of a path will do for a name, if it is the end
        of one path only.
      config: the configuration, for its entries.

    Raises:
      JaxwmError: if a word has another form, or names no entry, several, one twice, or one that
        is not a number with fractions.
    """
    found: dict[str, tuple[float, ...]] = {}
    numbers = [_ROOT + path for path in _floats(config.agent)]
    others = [path for path in flatten(config) if path not in numbers]
    for word in sweep:
        name, _, listed = word.partition("=")
        path = _path(name.replace("-", "_"), numbers, others)
        require(path not in found, f"The sweep names {path} twice. Give all its values at once.")
        try:
            found[path] = tuple(float(value) for value in listed.split(","))
        except ValueError:
            found[path] = ()
        single = [_single(value) for value in found[path]]  # as the program sees them
        require(
            len(single) > 0 and all(map(math.isfinite, single)),
            f"The sweep of {path} should be numbers with commas between them, such as "
            f"{name}=1e-5,4e-5, not {word!r}.",
        )
        require(
            len(set(single)) == len(single),
            f"The sweep of {path} names a value twice: {listed} (in float32).",
        )
    return found


def settings(config: Any) -> list[dict[str, float]]:
    """Every combination of the swept values, by dotted path; a single empty one without a sweep."""
    swept = parse(config.sweep, config)
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def columns(config: Any) -> dict[str, list[float]]:
    """The value of each swept entry for each member."""
    rows = [setting for setting in settings(config) for _ in range(config.seeds)]
    return {path: [row[path] for row in rows] for path in rows[0]}


def labels(config: Any) -> list[str]:
    """The setting of each member as "learning_rate=1e-05 entropy=0.0001"; "" without a sweep."""
    rows = [setting for setting in settings(config) for _ in range(config.seeds)]
    paths = [path.split(".") for path in rows[0]]

    def short(path: list[str]) -> str:
        """The end of a path that is the end of no other one."""
        ends = (path[-count:] for count in range(1, len(path) + 1))
        return ".".join(next(end for end in ends if sum(x[-len(end) :] == end for x in paths) == 1))

    names = [short(path) for path in paths]
    return [
        " ".join(f"{name}={value!r}" for name, value in zip(names, row.values(), strict=True))
        for row in rows
    ]


def member(config: T, index: int) -> T:
    """The configuration of one member: what it would be if it trained alone.

    Both then learn the same to rounding, until a class that is sampled comes out differently for
    it: to 1e-5 over the first fifty updates or so.

    Raises:
      JaxwmError: if one of its values is out of range.
    """
    run: Any = config
    setting = settings(run)[index // run.seeds]
    alone = dataclasses.replace(run, sweep=(), seeds=1, seed=run.seed + index % run.seeds)
    for path, value in setting.items():
        alone = _replaced(alone, path.split("."), value, dataclasses.replace)
    return alone


def check(config: Any, index: int) -> None:
    """Checks the values of one member, as they are given and as float32, which computes them.

    Raises:
      JaxwmError: if one is out of range.
    """
    alone = member(config, index)
    for path, value in settings(config)[index // config.seeds].items():
        _replaced(alone, path.split("."), _single(value), dataclasses.replace)


def _single(value: float) -> float:
    """A number as float32 holds it; infinite if that cannot."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def put(config: T, values: Mapping[str, Any]) -> T:
    """A configuration with other entries, which may be traced and are not checked.

    Args:
      config: a dataclass.
      values: what to put, by dotted path.
    """
    for path, value in values.items():
        config = _replaced(config, path.split("."), value, unchecked)
    return config


def _replaced(config: Any, names: list[str], value: Any, replace: Any) -> Any:
    name, *rest = names
    if rest:
        value = _replaced(getattr(config, name), rest, value, replace)
    return replace(config, **{name: value})


def _floats(config: Any, path: str = "") -> list[str]:
    """Paths of the entries of a dataclass that are declared as float, schedules included."""
    hints, found = typing.get_type_hints(type(config)), []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        if dataclasses.is_dataclass(value):
            found += _floats(value, f"{name}.")
        elif float in (hints[field.name], *typing.get_args(hints[field.name])):
            found.append(name)
    return found


def _path(name: str, paths: list[str], others: list[str]) -> str:
    """The one path of `paths` that ends in `name`; `others` cannot be swept."""
    ends = [path for path in paths if f".{path}".endswith(f".{name}")]
    require(
        len(ends) < 2, f"The sweep's {name!r} may be {' or '.join(ends)}. Give more of the path."
    )
    whole = [path for path in others if f".{path}".endswith(f".{name}")]
    require(
        bool(ends) or not whole,
        f"There is no entry to sweep called {name!r}. Members of one program differ only in "
        f"numbers with fractions, not in {' or '.join(whole)}: train each value in a run of its "
        "own.",
    )
    if not ends:
        ends = {x.rpartition(".")[2] for x in paths}
        raise nearest(name, {*paths, *ends}, "entry to sweep")
    return ends[0]
