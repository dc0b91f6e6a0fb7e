"""The seal of a checkpoint: what its folder holds, with sizes and checksums, in `MANIFEST.json`.

It is written last, and covers itself, so a folder is what was saved if and only if it agrees with
its manifest. Whatever a folder claims is checked before it is believed: nothing outside of it is
read, no link is followed, and no more is read than the manifest says there is.
"""

import json
import os
import re
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "MANIFEST.json"
FORMAT = 3
# Bytes of a manifest; that of a large model takes a tenth. JSON takes many times that in memory.
LARGEST = 1 << 22
_BLOCK = 1 << 20
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*")


# What reading JSON raises that is not as it was written.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class Damaged(Exception):
    """What is wrong with a checkpoint, in a few words."""


def seal(folder: Path, about: dict[str, Any], known: dict[str, list[int]] | None = None) -> None:
    """Writes the manifest of a folder, after everything in it has reached the disk.

    Args:
      folder: the folder; all that it holds is sealed.
      about: what else the manifest says.
      known: sizes and checksums that files must have.

    Raises:
      Damaged: if a file is not as it is known.
    """
    files = {path: _sum(folder / path, settle=True) for path in _files(folder)}
    for path, entry in (known or {}).items():
        if files.get(path) != entry:
            raise Damaged(f"{path} has changed")
    body = {"format": FORMAT, **about, "files": files}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        settle(Path(parent))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
      Damaged: if there is none, or it is not as it was written.
    """
    try:
        _regular(folder / NAME, LARGEST)
        found = json.loads((folder / NAME).read_bytes())
        if found.pop("checksum") != _checksum(found):
            raise Damaged(f"{NAME} has changed")
        form = int(found["format"])
        files = {str(path): (int(size), int(sum)) for path, (size, sum) in found["files"].items()}
        for parts in (found["leaves"], found.get("sums", {})):
            _ = [dict(part) for part in parts.values()]
        _ = [list(numbers) for numbers in found.get("packed", {}).values()]
        _ = found["config"], found["step"]
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except UNREADABLE:
        raise Damaged(f"{NAME} cannot be read") from None
    if form > FORMAT:
        raise Damaged(f"it has format {form}, and this version of jaxwm reads up to {FORMAT}")
    for path in files:
        if not _PATH.fullmatch(path) or ".." in path.split("/"):
            raise Damaged(f"{NAME} names {path!r}, which is no file of a checkpoint")
    return found


def check(
    folder: Path,
    found: dict[str, Any],
    parts: Iterable[str] | None = None,
    limit: int | None = None,
) -> None:
    """Compares a folder with its manifest.

    Args:
      folder: the folder.
      found: its manifest, from `read`.
      parts: names of the folders in it to read; by default all.
      limit: bytes that they may have.

    Raises:
      Damaged: at the first difference.
    """
    if folder.is_symlink():
        raise Damaged("it is a link")

    def asked(path: str) -> bool:
        return path != NAME and (parts is None or path.partition("/")[0] in parts)

    wanted = {path: x for path, x in found["files"].items() if asked(path)}
    for path in _files(folder) if parts is None or parts else []:
        if asked(path) and path not in wanted:
            raise Damaged(f"{path} does not belong to it")
    size = sum(x[0] for x in wanted.values())
    if limit is not None and size > limit:
        raise Damaged(f"its files have {size:,} bytes, more than {limit:,}")
    for path, (size, checksum) in wanted.items():
        try:
            for parent in list(Path(path).parents)[:-1]:
                if (folder / parent).is_symlink():
                    raise Damaged(f"{parent} is a link")
            _regular(folder / path, size)
            same = _sum(folder / path) == [size, checksum]
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from None
        if not same:
            raise Damaged(f"{path} has changed")


def ordinary(folder: Path) -> None:
    """Raises `Damaged` if a folder without a manifest holds links, pipes or devices."""
    if folder.is_symlink():
        raise Damaged("it is a link")
    for path in _files(folder):
        _regular(folder / path, None)


def settle(path: Path) -> None:
    """Waits until a file or folder has reached the disk; where that cannot be told, does not."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:  # folders of some network file systems
        pass
    finally:
        os.close(number)


def _files(folder: Path) -> list[str]:
    """Paths of everything in a folder that is not itself a folder; links are not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in files + links]
    return sorted(found)


def _regular(path: Path, size: int | None) -> None:
    """Raises `Damaged` unless there is an ordinary file of no more than so many bytes."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path.name} is no ordinary file")
    if size is not None and found.st_size > size:
        raise Damaged(f"{path.name} has {found.st_size} bytes, more than {size}")


def _sum(path: Path, settle: bool = False) -> list[int]:
    """Size and checksum of a file."""
    size = value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, value = size + len(block), zlib.crc32(block, value)
        if settle:
            os.fsync(file.fileno())
    return [size, value]


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
