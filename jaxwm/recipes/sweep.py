"""Members: the trainings that run side by side in one program, one for each setting and seed.

A sweep names numbers of the agent's configuration and the values each should take:

    learning_rate=1e-5,4e-5 entropy=1e-4,3e-4

These are four settings; with two seeds, eight members. Members are ordered by setting, each setting
with all its seeds. In the program a swept number is an array over members, so all settings share
one compiled program. What would change the program's form, such as a size, cannot be swept.

A number that is a schedule can be swept as a whole (`learning_rate=1e-3,1e-4` sets its start and
scales its end with it), or by its parts `learning_rate.start` and `learning_rate.end`. A number
that decides a shape says so in its field, `field(default=0.1, metadata=fixed("why"))`.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxwm.config import flatten, require, unchecked
from jaxwm.optim import Schedule
from jaxwm.spaces import nearest

T = TypeVar("T")

_ROOT = "agent."
_FIXED = "fixed"


def fixed(why: str) -> dict[str, str]:
    """Metadata for the field of a configuration whose number cannot be swept.

    Args:
      why: the end of the sentence "... cannot be swept: ".
    """
    return {_FIXED: why}


def parse(sweep: tuple[str, ...], config: Any) -> dict[str, tuple[float, ...]]:
    """The values of each swept number, by its dotted path.

    Args:
      sweep: words "NAME=VALUE,VALUE,...". The end of a path is enough as a name, if no other path
        ends in it.
      config: the configuration.

    Raises:
      JaxwmError: if a word has another form, or names no number, several, one twice, or an entry
        that cannot be swept.
    """
    found: dict[str, tuple[float, ...]] = {}
    for word in sweep:
        name, _, listed = word.partition("=")
        path = _path(name.replace("-", "_"), config)
        for other in found:
            require(
                not f"{path}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{path}."),
                f"The sweep names {path} twice. Give all its values at once."
                if path == other
                else f"The sweep names {other} and {path}. Sweep the schedule or its parts.",
            )
        found[path] = _values(path, word, name, listed)
    return found


def _values(path: str, word: str, name: str, listed: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in listed.split(","))
    except ValueError:
        values = ()
    single = [_single(value) for value in values]  # as the program sees them
    require(
        len(single) > 0 and all(map(math.isfinite, single)),
        f"The sweep of {path} should be numbers with commas between them, such as "
        f"{name}=1e-5,4e-5, not {word!r}.",
    )
    require(
        len(set(single)) == len(single),
        f"The sweep of {path} names a value twice: {listed} (in float32).",
    )
    return values


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
    paths = [_split(path) for path in rows[0]]

    def short(path: list[str]) -> str:
        """The shortest end of a path that no other swept path shares."""
        ends = (path[-count:] for count in range(1, len(path) + 1))
        return ".".join(next(end for end in ends if sum(x[-len(end) :] == end for x in paths) == 1))

    short_names = [short(path) for path in paths]
    return [
        " ".join(f"{name}={value!r}" for name, value in zip(short_names, row.values(), strict=True))
        for row in rows
    ]


def names(config: Any) -> list[str]:
    """A name for each member: "learning_rate=1e-05 seed 3"."""
    seeds = [f"seed {config.seed + i % config.seeds}" for i in range(config.members)]
    return [f"{x} {y}".strip() for x, y in zip(labels(config), seeds, strict=True)]


def _split(path: str) -> list[str]:
    """The names in a path; the start or end of a schedule keeps the schedule's name."""
    *parents, name = path.split(".")
    if name in ("start", "end") and parents:
        return [*parents[:-1], f"{parents[-1]}.{name}"]
    return [*parents, name]


def member(config: T, index: int) -> T:
    """The configuration with which one member would train alone.

    Both learn the same up to float rounding (1e-5 over the first fifty updates or so) until
    rounding flips a sampled class; from there the two diverge.

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
    """Checks the values of one member, as given and rounded to float32.

    Raises:
      JaxwmError: if one is out of range.
    """
    alone = member(config, index)
    for path, value in settings(config)[index // config.seeds].items():
        _replaced(alone, path.split("."), _single(value), dataclasses.replace)


def _single(value: float) -> float:
    """A number rounded to float32; infinite if it is too large."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def put(config: T, values: Mapping[str, Any]) -> T:
    """A configuration with other numbers, which may be traced and are not checked.

    Args:
      config: a dataclass.
      values: what to put, by dotted path.
    """
    for path, value in values.items():
        config = _replaced(config, path.split("."), value, unchecked)
    return config


def _replaced(config: Any, names: list[str], value: Any, replace: Callable[..., Any]) -> Any:
    name, *rest = names
    old = getattr(config, name)
    if rest:
        value = _replaced(old, rest, value, replace)
    elif isinstance(old, Schedule):
        value = replace(old, start=value, end=old.end / old.start * value)
    return replace(config, **{name: value})


def _entries(config: Any, path: str = "") -> dict[str, str]:
    """Why each number with fractions cannot be swept, by its path; "" if it can."""
    hints, found = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        if isinstance(value, Schedule):
            still = "it is a schedule that starts at 0. Sweep its end"
            found[name] = "" if value.start else still
            found |= {f"{name}.start": "", f"{name}.end": ""}
        elif dataclasses.is_dataclass(value):
            found |= _entries(value, f"{name}.")
        elif float in (hints[field.name], *typing.get_args(hints[field.name])):
            found[name] = "it is None" if value is None else field.metadata.get(_FIXED, "")
    return found


def _path(name: str, config: Any) -> str:
    """The one number whose path ends in `name`."""
    entries = {_ROOT + path: why for path, why in _entries(config.agent).items()}
    ends = [path for path in entries if f".{path}".endswith(f".{name}")]
    require(
        len(ends) < 2, f"The sweep's {name!r} may be {' or '.join(ends)}. Give more of the path."
    )
    others = [path for path in flatten(config) if path not in entries]
    whole = [path for path in others if f".{path}".endswith(f".{name}")]
    require(
        bool(ends) or not whole,
        f"There is no entry to sweep called {name!r}. Members of one program differ only in "
        f"numbers with fractions, not in {' or '.join(whole)}: train each value in a run of its "
        "own.",
    )
    if not ends:
        raise nearest(name, {*entries, *(x.rpartition(".")[2] for x in entries)}, "entry to sweep")
    (path,) = ends
    require(not entries[path], f"{path} cannot be swept: {entries[path]}.")
    return path
