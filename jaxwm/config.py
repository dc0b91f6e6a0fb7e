"""Configurations as JSON: frozen dataclasses out, the very same dataclasses back, or an error.

Reading is strict: an unknown key, a missing key or a value of another type is refused with the
path of the key, so a stored configuration means what it says.
"""

import copy
import dataclasses
import errno
import json
import math
import os
import stat
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from jaxwm.spaces import JaxwmError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, lists, strings and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write(config: Any, path: Path) -> None:
    """Writes a dataclass as JSON, see `replace_file`."""
    replace_file(path, json.dumps(to_dict(config), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one move: a reader, or a kill, finds all of the new one or the old one."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_json(path: Path, limit: int = 1 << 20) -> Any:
    """The JSON in a file.

    Args:
      path: the file.
      limit: bytes that it may have; JSON takes many times its size in memory.

    Raises:
      JaxwmError: if it is no ordinary file, larger than that, or not JSON.
    """
    raw = read_bytes(path, limit)
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise JaxwmError(f"{path} is not JSON: {error}.") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """What is in a file that may come from anybody: it is an ordinary one, and not too large.

    Raises:
      JaxwmError: if there is no such file, it is a link, a pipe or a device, or it has more than
        `limit` bytes.
    """
    try:
        # Opening a pipe would wait for a writer, and a link may lead anywhere.
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise JaxwmError(f"There is no file {path}.") from None
    except OSError as error:
        link = error.errno == errno.ELOOP
        why = "it is a link; put the file itself there" if link else error.strerror
        raise JaxwmError(f"{path} cannot be read: {why}.") from None
    try:
        found = os.fstat(number)
        require(stat.S_ISREG(found.st_mode), f"{path} cannot be read: it is no ordinary file.")
        require(
            found.st_size <= limit,
            f"{path} has {found.st_size:,} bytes; it should have no more than {limit:,}.",
        )
        with open(number, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(number)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """A dataclass from nested dicts.

    A class may have a static method `entry_types(data)` with the types of entries that depend on
    other entries.

    Args:
      cls: the dataclass to build.
      data: one entry per field, nothing else.
      path: where `data` stands, for messages.

    Raises:
      JaxwmError: naming the key, what it holds and what it should hold.
    """
    if not isinstance(data, dict):
        raise JaxwmError(f"The configuration entry {path or 'root'} should be a table: {data!r}.")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    for key in data:
        if key not in names:
            raise nearest(path + key, [path + name for name in names], "configuration entry")
    missing = [path + name for name in names if name not in data]
    if missing:
        raise JaxwmError(f"The configuration lacks {', '.join(missing)}.")
    if hasattr(cls, "entry_types"):
        hints |= typing.cast(Any, cls).entry_types(data)
    values = {name: _convert(hints[name], data[name], path + name) for name in names}
    return cls(**values)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The entries in which two dataclasses of one type differ, as "path: a here, b there"."""
    lines = []
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            lines += differences(a, b, f"{path}{field.name}.")
        elif a != b:
            lines.append(f"{path}{field.name}: {_shown(a)} here, {_shown(b)} there")
    return lines


def _shown(value: Any) -> str:
    """A value for a message: a whole table by the name of its class."""
    if isinstance(value, Inline):
        return str(value)
    return f"a {type(value).__name__}" if dataclasses.is_dataclass(value) else repr(value)


class Inline:
    """Base of a dataclass that is one entry of a configuration, and one flag: `str` of it."""


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """The entries of a dataclass by their dotted paths, those of nested dataclasses in place."""
    entries = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        nested = dataclasses.is_dataclass(value) and not isinstance(value, Inline)
        entries |= flatten(value, f"{name}.") if nested else {name: value}
    return entries


def unchecked(config: T, **values: Any) -> T:
    """`dataclasses.replace` without `__post_init__`, whose checks need real numbers, not traced."""
    config = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config


def changed(config: T, **values: Any) -> T:
    """The same configuration with other values; None leaves what is there."""
    given = {name: value for name, value in values.items() if value is not None}
    whole: Any = config
    return dataclasses.replace(whole, **given)


def require(condition: bool, message: str) -> None:
    """Raises a `JaxwmError` with `message` unless `condition` holds."""
    if not condition:
        raise JaxwmError(message)


def few(lines: list[str]) -> str:
    """The first three, and how many more there are."""
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def at_least(config: Any, minimum: float, *names: str) -> None:
    """Raises a `JaxwmError` unless the entries `names` are finite and not below `minimum`."""
    for name in names:
        value = getattr(config, name)
        text = f"{type(config).__name__}.{name} is {value}; it must be at least {minimum}."
        require(minimum <= value < math.inf, text)


def positive(config: Any, *names: str) -> None:
    """Raises a `JaxwmError` unless the entries `names` are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        text = f"{type(config).__name__}.{name} is {value}; it must be positive."
        require(0 < value < math.inf, text)


def share(config: Any, *names: str) -> None:
    """Raises a `JaxwmError` unless the entries `names` lie in 0..1."""
    for name in names:
        value = getattr(config, name)
        text = f"{type(config).__name__}.{name} is {value}; it must lie in 0 to 1."
        require(0 <= value <= 1, text)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path + ".")
    if origin is typing.Literal:
        ok = value in args
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        # A number or a table, such as a schedule.
        fits = [arg for arg in kinds if dataclasses.is_dataclass(arg) == isinstance(value, dict)]
        return _convert((fits or kinds)[0], value, path)
    elif origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], part, f"{path}[{i}]") for i, part in enumerate(value))
    elif hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    else:
        ok = isinstance(value, hint) and (hint is bool) == isinstance(value, bool)
    if not ok:
        wanted = " or ".join(map(repr, args)) if origin is typing.Literal else str(hint)
        raise JaxwmError(f"The configuration entry {path} is {value!r}; it should be {wanted}.")
    return value
