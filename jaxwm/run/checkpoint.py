"""Checkpoints: the whole experiment on disk, and back bit for bit.

A checkpoint is a folder RUN/checkpoints/STEP, which gets this name once it is complete. It holds
the parts of the state (`parts`) and `MANIFEST.json`: the configuration, path, type, shape and
checksum of every leaf, and size and checksum of every file (`manifest`).

Orbax writes and reads the arrays by number, so that any pytree can be stored. The small arrays of a
part are stored as one: each array costs Orbax time, and memory that it never returns. Nothing
stores which checkpoint is the latest: it is the one with the largest step that agrees with its
manifest. `saver` writes checkpoints, and `formats` knows those of earlier versions.
"""

import contextlib
import dataclasses
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxwm.config import differences, few, read_json, require
from jaxwm.recipes import RunConfig
from jaxwm.run import arrays, formats, manifest, parts
from jaxwm.run.manifest import Damaged
from jaxwm.train import processes
from jaxwm.types import JaxwmError, Params

CONFIG = "config.json"
FOLDER = "checkpoints"
BEST = "best-"
# Entries that may change from one part of a run to the next.
FREE = ("steps", "eval_episodes", "log_every", "save_every", "host", "shard_params")
# What an interrupted save leaves behind, in this format and the first one.
LEFT_OVER = re.compile(r"\.[\w.-]+\.(saving|old)|\d+\.orbax-checkpoint-tmp.*")
_OURS = re.compile(rf"{LEFT_OVER.pattern}|\d+|{BEST}\d+(\.\d+)?|\d+\.damaged(\.\d+)?")


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending; some may be damaged."""
    try:
        names = [x.name for x in (run / FOLDER).iterdir() if x.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(x) for x in names if x.isascii() and x.isdecimal())


def latest(run: Path) -> int:
    """The step of a run's newest sound checkpoint.

    Raises:
      JaxwmError: if the run has none.
    """
    for step in reversed(steps(run)):
        if not faults(run / FOLDER / str(step)):
            return step
    raise _none(run)


def faults(
    folder: Path, names: tuple[str, ...] | None = None, limit: int | None = None
) -> list[str]:
    """What is wrong with a checkpoint's folder; empty if it is as it was saved.

    Args:
      folder: RUN/checkpoints/STEP.
      names: the parts to read; by default all.
      limit: the most bytes that their files may have.
    """
    try:
        _open(folder, names, limit)
    except Damaged as wrong:
        return [str(wrong)]
    return []


def read_config(run: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      JaxwmError: if there is no such folder, it is not a run, or its configuration is not valid.
    """
    require(run.exists(), f"There is no run folder {run}. `jaxwm train` makes one.")
    require(
        (run / CONFIG).is_file(),
        f"{run} is not the folder of a run: it has no {CONFIG}. Give the folder that `jaxwm train` "
        "named, such as runs/demo.",
    )
    return formats.configured(read_json(run / CONFIG))


def check_config(run: Path, config: RunConfig, accept: bool = False) -> None:
    """Raises an error if a run's newest readable checkpoint has another configuration.

    Args:
      run: the run's folder.
      config: what the run is now; see `restore`.
      accept: whether any entry may differ.
    """
    for step in reversed(steps(run)):
        folder = run / FOLDER / str(step)
        with contextlib.suppress(Damaged):
            return _check_config(folder, _open(folder, ()), config, accept)


def refuse_links(run: Path) -> None:
    """Raises an error if files written into a run's folder would go elsewhere."""
    links = sorted(path.name for path in run.iterdir() if path.is_symlink())
    require(
        not links,
        f"{run} holds links ({', '.join(links)}), and a run writes into its own folder only. Put "
        "the files themselves there, or let the whole folder be a link.",
    )


def restore(
    run: Path,
    like: Any,
    config: RunConfig,
    tell: Callable[[str], None] = print,
    accept: bool = False,
) -> Any:
    """The state of the newest sound checkpoint, on the device except for what is numpy in `like`.

    Args:
      run: the run's folder.
      like: the shapes of the state, `program.shapes()`.
      config: what the run is now; it may differ from the stored one in `FREE` entries.
      tell: gets a sentence for every checkpoint that is skipped.
      accept: whether other entries may differ too, as long as the leaves are the same.

    Returns:
      A state of the same type as `like`, ready to be donated to `Program.chunk`.

    Raises:
      JaxwmError: if there is no sound checkpoint, or it has another configuration.
    """
    return _newest(
        run, lambda folder, found: _state(folder, found, like, config, accept), tell, like
    )


def restore_params(
    run: Path,
    like: Params,
    config: RunConfig,
    best: bool = False,
    tell: Callable[[str], None] = print,
) -> tuple[Params, int]:
    """The networks of the newest sound checkpoint, and its step; reads nothing else.

    Args:
      run: the run's folder.
      like: their shapes.
      config: what the run is now.
      best: take the networks with the best returns in training instead.
      tell: gets a sentence for every checkpoint that is skipped.

    Raises:
      JaxwmError: as `restore` does.
    """

    def params(folder: Path, found: dict[str, Any]) -> tuple[Params, int]:
        _check(folder, found, {parts.PARAMS: like}, config, accept=False)
        return _read(folder, found, parts.PARAMS, like), int(found["step"])

    return _newest(run, params, tell, like, (parts.PARAMS,), best)


def prune(run: Path) -> list[str]:
    """Removes the damaged and the unfinished checkpoints of a run; returns their names."""
    refuse_links(run)
    folder, gone = run / FOLDER, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        bad = LEFT_OVER.fullmatch(path.name) or ".damaged" in path.name
        if _OURS.fullmatch(path.name) and path.is_dir() and (bad or faults(path)):
            remove(path)
            gone.append(path.name)
    return gone


def remove(folder: Path) -> None:
    """Removes a folder, which vanishes for others in one move."""
    gone = folder.with_name(f".{folder.name}.old")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def overview(run: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and state ("sound", or what is wrong) of every checkpoint of a run."""
    folder, lines = run / FOLDER, []
    names = [str(step) for step in steps(run)]
    others = sorted(x.name for x in folder.iterdir() if x.is_dir()) if folder.is_dir() else []
    for name in names + [x for x in others if x not in names]:
        path = folder / name
        size = sum(x.lstat().st_size for x in path.rglob("*") if x.is_file())
        wrong = ["unfinished"] if name.startswith(".") else faults(path)
        old = not wrong and formats.is_first(path)
        state = "sound as far as one can see: it has no checksums" if old else "sound"
        lines.append((name, size, wrong[0] if wrong else state))
    return lines


def score(folder: Path) -> float:
    """The mean return in training that a checkpoint was saved with; -inf if there was none."""
    try:
        return float(manifest.read(folder)["score"])
    except (Damaged, *manifest.UNREADABLE):
        return -math.inf


def whole_path(path: Path) -> Path:
    """The absolute path of a folder for Orbax, which takes UTF-8 only.

    Raises:
      JaxwmError: if the path is not UTF-8.
    """
    path = path.resolve()
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise JaxwmError(
            f"The name of {path} has characters outside {sys.getfilesystemencoding()}, this "
            "system's encoding of file names. Set PYTHONUTF8=1, or give the folder another name."
        ) from None
    return path


def _newest(
    run: Path,
    use: Callable[[Path, dict[str, Any]], Any],
    tell: Callable[[str], None],
    like: PyTree,
    names: tuple[str, ...] | None = None,
    best: bool = False,
) -> Any:
    """What `use` makes of the newest sound checkpoint, or of the best one."""
    folder = run / FOLDER
    # Files are little larger than their arrays; rows of the replay may be stored twice.
    limit = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)) + (1 << 26)
    there = [folder / str(step) for step in reversed(steps(run))]
    if best:
        there = sorted(folder.glob(f"{BEST}*"), key=score, reverse=True)
        require(bool(there), f"The run {run} has no best checkpoint: no episode has ended yet.")
    for path in there:
        wrong = faults(path, names, limit) if jax.process_index() == 0 else []
        if not processes.agree(len(wrong)):  # in several processes the first one judges
            try:
                return use(path, _open(path, ()))
            except Damaged as found:
                wrong = [str(found)]
        tell(f"The checkpoint {path} is damaged: {'; '.join(wrong)}. Skipping it.")
    raise _none(run)


def _none(run: Path) -> JaxwmError:
    there = [f"{run / FOLDER / str(step)}" for step in steps(run)]
    if there:
        return JaxwmError(
            f"None of the checkpoints of the run {run} is sound ({', '.join(there)}). See `jaxwm "
            f"checkpoints {run}`; train again in another folder."
        )
    return JaxwmError(
        f"The run {run} has no checkpoint yet: it was stopped before the first one. Start it again "
        f"with `jaxwm resume {run}`, with a smaller --save-every if need be."
    )


def _open(
    folder: Path, names: tuple[str, ...] | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The manifest of an sound checkpoint; raises `Damaged` if it is not."""
    if formats.is_first(folder):
        return formats.read_first(folder)
    found = manifest.read(folder)
    manifest.check(folder, found, names, limit)
    name = str(found.get("step"))
    if folder.name not in (name, BEST + name):
        raise Damaged(f"it is the checkpoint of step {name}")
    return found


def _state(folder: Path, found: dict[str, Any], like: Any, config: RunConfig, accept: bool) -> Any:
    """The state in a checkpoint."""
    if found["format"] == 1:
        wanted = {parts.PARAMS: like.agent.params, parts.REST: parts.without_params(like)}
        _check(folder, found, wanted, config, accept)
        read = {name: _read(folder, found, name, part) for name, part in wanted.items()}
        return parts.with_params(read[parts.REST], read[parts.PARAMS])
    try:
        written, pieces = _pieces(found, like.buffer)
        leaves = dict(found["leaves"], replay=dict(found["replay"]["leaves"]))
    except manifest.UNREADABLE:
        raise Damaged("its manifest lacks the replay") from None
    wanted = {parts.PARAMS: like.agent.params, parts.REST: parts.rest(like)}
    _check(folder, {**found, "leaves": leaves}, {**wanted, "replay": like.buffer}, config, accept)
    read = {name: _read(folder, found, name, part) for name, part in wanted.items()}
    buffer = _buffer(folder, found, like, written, pieces)
    return parts.with_params(read[parts.REST]._replace(buffer=buffer), read[parts.PARAMS])


def _pieces(found: dict[str, Any], buffer: Any) -> tuple[int, list[list[int]]]:
    """Rows written to each ring, and the pieces in which a checkpoint has those that remain."""
    written, pieces = int(found["replay"]["written"]), parts.pieces(found["replay"])
    capacity = buffer.rows.is_first.shape[-1]
    if not all(0 <= a < b <= min(written, a + capacity) for a, b in pieces) or written >> 31:
        raise ValueError(pieces)
    return written, pieces


def _buffer(
    folder: Path, found: dict[str, Any], like: Any, written: int, pieces: list[list[int]]
) -> Any:
    """The replay in a checkpoint."""
    axis, buffer = parts.ring_axis(like), like.buffer
    size, blocks = parts.blocks(buffer, written)
    memo = jax.tree.map(arrays.empty, buffer.memo)
    if blocks:
        block = jax.tree.map(lambda x: arrays.resized(x, size, axis), buffer.memo)
        stored = _read(folder, found, formats.memo_part(found["format"]), [block] * len(blocks))
        for first, new in zip(blocks, stored, strict=True):
            memo = arrays.put(memo, new, first, axis)
    rows = jax.tree.map(arrays.empty, buffer.rows)
    for first, stop in pieces:  # the oldest first: later rows have overwritten them
        part = jax.tree.map(lambda x, n=stop - first: arrays.resized(x, n, axis), buffer.rows)
        rows = arrays.put(rows, _read(folder, found, parts.piece(first, stop), part), first, axis)
    return type(buffer)(rows, memo)


def _read(folder: Path, found: dict[str, Any], name: str, like: PyTree) -> PyTree:
    """A part of a checkpoint, whose leaves are as they were when it was saved."""
    places = formats.places(found, name, like)
    small = _small_there(found, name, places)
    stored = {number: place for number, place in places.items() if number not in small}
    if small:
        size = sum(arrays.size(place) for place in small.values())
        stored[arrays.PACK] = np.broadcast_to(np.zeros((), np.uint8), (size,))
    path = whole_path(folder / name)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            _check_sizes(checkpointer.metadata(path).item_metadata.tree, stored)  # type: ignore
            got = checkpointer.restore(
                path,
                args=ocp.args.StandardRestore(stored),  # type: ignore
            )
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise Damaged(f"{name} cannot be read ({text})") from error
    if small:
        got |= arrays.unpack(got.pop(arrays.PACK), small)
    sums = found.get("sums", {}).get(name, {})
    for number, leaf in got.items():
        known = sums.get(number)
        if known is not None and arrays.is_whole(leaf) and arrays.checksum(leaf) != known:
            raise Damaged(f"leaf {number} of {name} has changed")
    return arrays.join(like, formats.renumbered(found, name, like, got))


def _check_sizes(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises an error if arrays, or the blocks they are stored in, are larger than they should be.

    Otherwise a damaged file could make the process allocate any amount of memory.
    """
    for number, place in here.items():
        shape, block = there[number].shape, there[number].storage.chunk_shape
        if tuple(shape) != place.shape or any(x > y for x, y in zip(block, shape, strict=True)):
            raise ValueError(f"{number} has shape {shape} in blocks of {block}, not {place.shape}")


def _small_there(found: dict[str, Any], name: str, places: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a part that are stored in one array."""
    try:
        numbers = found.get("packed", {}).get(name, [])
        small = {str(number): places[number] for number in numbers}
        if len(small) < len(numbers):
            raise ValueError(numbers)
    except manifest.UNREADABLE:
        raise Damaged(f"its manifest names leaves of {name} that it cannot have") from None
    return small


def _check(
    folder: Path, found: dict[str, Any], wanted: dict[str, Any], config: RunConfig, accept: bool
) -> None:
    """Raises an error unless configuration and leaves are those of the checkpoint."""
    _check_config(folder, found, config, accept)
    wrong = []
    for name, part in wanted.items():
        wrong += formats.unlike(found["format"], dict(found["leaves"][name]), part)
    if wrong:
        raise JaxwmError(
            f"The checkpoint {folder} has another configuration, or was made by another version or "
            f"on another kind of device. {few(wrong)}. Restore {CONFIG} as it was, or start a new "
            "run in another folder."
        )


def _check_config(folder: Path, found: dict[str, Any], config: RunConfig, accept: bool) -> None:
    """Raises an error unless the configuration is that of the checkpoint, or may be another."""
    stored = formats.configured(found["config"])
    same = dataclasses.replace(stored, **{name: getattr(config, name) for name in FREE})
    wrong = [] if accept else differences(config, same)
    if wrong:
        raise JaxwmError(
            f"The checkpoint {folder} has another configuration. {few(wrong)}. Restore {CONFIG} as "
            "it was, use --accept-changes if the changes are meant, or start a new run in another "
            "folder."
        )
