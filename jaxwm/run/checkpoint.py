"""Checkpoints: the whole experiment on disk, and back bit for bit.

A checkpoint is a folder RUN/checkpoints/STEP, which has this name once it is complete:

- `params`: the networks, all that acting needs;
- `rest`: optimiser, statistics, environments, counters, keys;
- `latents`: those in the replay, which training changes everywhere;
- `rows-FIRST-STOP`: rows of the replay, counted from the start of the run. Rows never change, so
  those that an earlier checkpoint has are taken over from it, as hard links where there are such;
- `MANIFEST.json`: the configuration, every leaf's path, type, shape and checksum, and every file's
  size and checksum; see `manifest`.

Orbax writes and reads the arrays, by number, so that any pytree can be stored. The small ones of a
part are stored as one: each array costs Orbax time, and memory that it never gives back. Which
checkpoint is the latest is stored nowhere: it is the one with the largest step that agrees with its
manifest. Two are kept. Each takes its rows over from the one before the last, which goes when the
new one is complete; so no two share a file, and damage to one never reaches the other.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import math
import os
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

from jaxwm import heap
from jaxwm.config import differences, few, from_dict, read_json, require, to_dict
from jaxwm.optim import Schedule
from jaxwm.recipes import RunConfig
from jaxwm.run import arrays, log, manifest
from jaxwm.run.manifest import Damaged
from jaxwm.train import mesh
from jaxwm.types import JaxwmError, Params

CONFIG = "config.json"
KEPT = 2
# These may change from one part of a run to the next.
FREE = ("steps", "eval_episodes", "log_every", "save_every", "host", "shard_params")
FOLDER = "checkpoints"
_BEST = "best-"
# What a save that was ended leaves, in this version and the first; and all that is a checkpoint's.
_LEFT_OVER = re.compile(r"\.[\w.-]+\.(saving|old)|\d+\.orbax-checkpoint-tmp.*")
_OURS = re.compile(rf"{_LEFT_OVER.pattern}|\d+|{_BEST}\d+(\.\d+)?|\d+\.damaged(\.\d+)?")
# Entries that configurations of version 0.1 lack, and what was done then.
_LATER = {"replay": {"context_every": 1}, "agent": {"model": {"recompute": False}}}
_MOST_PIECES = 64  # of the replay's rows; beyond, they are written anew as one


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending; whether they are sound is not known."""
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
    folder: Path, parts: tuple[str, ...] | None = None, limit: int | None = None
) -> list[str]:
    """What is wrong with a checkpoint's folder; nothing, if it is as it was saved.

    Args:
      folder: RUN/checkpoints/STEP.
      parts: the parts to read; by default all.
      limit: bytes that their files may have.
    """
    try:
        _open(folder, parts, limit)
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
    return _configured(read_json(run / CONFIG))


def check_config(run: Path, config: RunConfig, accept: bool = False) -> None:
    """Raises an error if a run's newest readable checkpoint is another configuration's.

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
    """Raises an error if what is written into a run's folder would go elsewhere."""
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
    """The state of the newest sound checkpoint, on the device but for what is numpy in `like`.

    Args:
      run: the run's folder.
      like: the shapes of the state, `program.shapes()`.
      config: what the run is now; it may differ from the stored one in `FREE` entries.
      tell: is given a sentence for every checkpoint that is passed over.
      accept: whether other entries may differ too, as long as the leaves are the same.

    Returns:
      A state of the same type as `like`, ready to be donated to `Program.chunk`.

    Raises:
      JaxwmError: if there is no sound checkpoint, or it is another configuration's.
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
    """The networks of the newest sound checkpoint, and its step; nothing else is read.

    Args:
      run: the run's folder.
      like: their shapes.
      config: what the run is now.
      best: take those with the best returns in training instead.
      tell: is given a sentence for every checkpoint that is passed over.

    Raises:
      JaxwmError: as `restore` does.
    """

    def params(folder: Path, found: dict[str, Any]) -> tuple[Params, int]:
        _check(folder, found, {"params": like}, config, accept=False)
        return _read(folder, found, "params", like), int(found["step"])

    return _newest(run, params, tell, like, ("params",), best)


class Saver:
    """Writes the checkpoints of a run, while the run goes on; use it in a `with` statement.

    A save that fails leaves the earlier checkpoints as they are, and is told.

    Args:
      run: the run's folder.
      config: the run.
      tell: is given a sentence about a save that failed.
      start: the step that the run goes on from, see `rewind`; None: from its newest checkpoint.
    """

    def __init__(
        self, run: Path, config: RunConfig, tell: Callable[[str], None], start: int | None = None
    ):
        self._run, self._config, self._tell = run, config, tell
        self._folder = _whole(run / FOLDER)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._job: concurrent.futures.Future[None] | None = None
        self._anew = self._has_failed = False
        self.failed = False
        if jax.process_index() > 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        if start is not None:
            self.rewind(start)

    def __enter__(self) -> "Saver":
        self._speak = _silence()
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._thread.shutdown()
        if not self._has_failed:  # futures of a failed save speak up at any time
            self._speak()

    def wait(self) -> None:
        """Returns once what was to be saved has reached the disk, or has failed."""
        if self._job is not None:
            self._job.result()
            self._job = None

    def rewind(self, step: int) -> None:
        """Sets aside the checkpoints of later steps than a run goes on from: they are damaged."""
        if jax.process_index() > 0:
            return
        for later in steps(self._run):
            if later > step:
                (self._folder / str(later)).rename(_free(self._folder / f"{later}.damaged"))

    def save(self, step: int, state: Any, score: float = math.nan) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Args:
          step: environment steps of one seed so far.
          state: the `TrainState`; it may be overwritten when this returns.
          score: the mean return of the episodes since the checkpoint before, if any ended.
        """
        self.wait()
        if (self._folder / str(step)).exists():
            self.failed = False
            return
        heap.borrow()
        try:
            parts, about, taken = self._prepare(step, state)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                raise
            self._tell_failed(step, error)
            heap.give_back()
            return
        about["score"] = score if math.isfinite(score) else None
        write = functools.partial(self._write, step, parts, about, taken)
        if jax.process_count() > 1:
            write()  # all of them, at the same time
        else:
            self._job = self._thread.submit(write)

    def _prepare(self, step: int, state: Any) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
        """Copies of what is to be written, what the manifest says, and whose rows to take over."""
        written, axis = int(state.clock.cursor.written), _axis(state)
        buffer, capacity = state.buffer, state.buffer.rows.is_first.shape[-1]
        base, pieces = self._rows_on_disk(written - capacity)
        first = pieces[-1][1] if pieces else max(0, written - capacity)
        whole = {"params": state.agent.params, "rest": _rest(state)}
        about = {
            "step": step,
            "config": to_dict(self._config),
            "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
            "leaves": {name: arrays.describe(part) for name, part in whole.items()},
        }
        parts = {name: arrays.copy(part) for name, part in whole.items()}
        size, blocks = _blocks(buffer, written)
        latents = (buffer.deter, buffer.stoch)
        parts["latents"] = arrays.numbered([arrays.take(latents, x, size, axis) for x in blocks])
        if written > first:
            pieces.append([first, written])
            new = arrays.take(buffer.rows, first, written - first, axis)
            parts[_piece(first, written)] = arrays.numbered(new)
        about["replay"] = {"written": written, "pieces": pieces, "leaves": arrays.describe(buffer)}
        return {name: part for name, part in parts.items() if part}, about, base

    def _rows_on_disk(self, oldest: int) -> tuple[Path | None, list[list[int]]]:
        """The checkpoint before the last, and its rows, as far as they are not all outdated."""
        complete = steps(self._run)
        base, pieces = None, []
        if len(complete) >= KEPT and not self._anew:
            base = self._folder / str(complete[-KEPT])
            try:
                pieces = _pieces(manifest.read(base)["replay"])
            except Damaged:
                base = None
        pieces = [piece for piece in pieces if piece[1] > oldest]
        if len(pieces) > _MOST_PIECES:
            base, pieces = None, []
        if jax.process_count() > 1:  # the others may have looked at another moment
            first = mesh.agree(pieces[0][0] if pieces else -1)
            stop = mesh.agree(pieces[-1][1] if pieces else -1)
            pieces = pieces if jax.process_index() == 0 else [[first, stop]] * (stop >= 0)
        return base, pieces

    def _write(
        self, step: int, parts: dict[str, Any], about: dict[str, Any], base: Path | None
    ) -> None:
        work = self._folder / f".{step}.saving"
        try:
            self._write_all(work, parts, about, base)
            if jax.process_index() == 0:
                work.rename(self._folder / str(step))
                manifest.settle(self._folder)
                self._remember_best(step, about["score"])
                for old in steps(self._run)[:-KEPT]:
                    _remove(self._folder / str(old))
            mesh.wait(f"saved {step}")
            self._anew = self.failed = False
        except Exception as error:
            if jax.process_count() > 1:
                raise
            self._anew = True
            shutil.rmtree(work, ignore_errors=True)
            self._tell_failed(step, error)
        finally:
            parts.clear()
            heap.give_back()

    def _tell_failed(self, step: int, error: Exception) -> None:
        self.failed = self._has_failed = True
        there = steps(self._run)
        stays = f"that of step {there[-1]:,} stays" if there else "there is none yet"
        self._tell(
            f"The checkpoint of step {step:,} could not be written to {self._folder}: "
            f"{_cause(error, self._folder)}. It is tried again at the next one; {stays}."
        )

    def _write_all(
        self, work: Path, parts: dict[str, Any], about: dict[str, Any], base: Path | None
    ) -> None:
        first = jax.process_index() == 0
        if first:
            leaves = [leaf for part in parts.values() for leaf in jax.tree.leaves(part)]
            needed = sum(leaf.nbytes for leaf in leaves)
            if shutil.disk_usage(self._folder).free < 1.1 * needed + (1 << 20):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        mesh.wait(f"begun {work.name}")
        packed = {name: arrays.small(part) for name, part in parts.items()}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            for name, part in parts.items():
                stored = arrays.pack(part, packed[name])
                checkpointer.save(work / name, args=ocp.args.StandardSave(stored))  # type: ignore
        if not first:
            return
        known, sums = {}, {name: arrays.sums(part) for name, part in parts.items()}
        if base is not None:
            before = manifest.read(base)
            sums, packed = before["sums"] | sums, before.get("packed", {}) | packed
            for piece in _pieces(about["replay"]):
                name = _piece(*piece)
                if name not in parts:
                    shutil.copytree(base / name, work / name, copy_function=_link)
                    known |= {x: y for x, y in before["files"].items() if x.startswith(f"{name}/")}
            sums = {name: x for name, x in sums.items() if (work / name).is_dir()}
            packed = {name: packed.get(name, []) for name in sums}
        manifest.settle(self._run / log.FILE)  # no checkpoint is ahead of the metrics
        manifest.seal(work, {**about, "sums": sums, "packed": packed}, known)

    def _remember_best(self, step: int, score: float | None) -> None:
        """Keeps the networks of a checkpoint beside it, if their returns are the best so far."""
        before = {path: _score(path) for path in self._folder.glob(f"{_BEST}*")}
        if score is None or score <= max(before.values(), default=-math.inf):
            return
        source, work = self._folder / str(step), self._folder / f".{_BEST}{step}.saving"
        found = manifest.read(source)
        about = {name: found[name] for name in ("step", "score", "config", "versions")}
        names = [name for name in ("leaves", "sums", "packed") if name in found]
        about |= {name: {"params": found[name]["params"]} for name in names}
        try:
            shutil.copytree(source / "params", work / "params")
            manifest.seal(work, about)
            work.rename(_free(self._folder / f"{_BEST}{step}"))
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            cause = _cause(error, self._folder)
            self._tell(f"The best networks so far, of step {step:,}, could not be kept: {cause}.")
            return
        for path in before:
            _remove(path)


# Orbax's own log, and that of futures whose loop has ended.
_LOUD = ("absl", "asyncio", "concurrent.futures")


def _silence() -> Callable[[], None]:
    """Keeps Orbax, and the futures that it leaves, from printing the errors that it raises.

    Threads of TensorStore that come to a loop which a failed save has closed can raise theirs
    nowhere.

    Returns:
      What ends it.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook

    def late(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":
            hook(error)

    def end() -> None:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = late
    return end


def prune(run: Path) -> list[str]:
    """Removes the damaged and the unfinished checkpoints of a run; returns their names."""
    refuse_links(run)
    folder, gone = run / FOLDER, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        bad = _LEFT_OVER.fullmatch(path.name) or ".damaged" in path.name
        if _OURS.fullmatch(path.name) and path.is_dir() and (bad or faults(path)):
            _remove(path)
            gone.append(path.name)
    return gone


def overview(run: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and state ("sound", or what is wrong) of whatever a run has of checkpoints."""
    folder, lines = run / FOLDER, []
    names = [str(step) for step in steps(run)]
    others = sorted(x.name for x in folder.iterdir() if x.is_dir()) if folder.is_dir() else []
    for name in names + [x for x in others if x not in names]:
        path = folder / name
        size = sum(x.lstat().st_size for x in path.rglob("*") if x.is_file())
        wrong = ["unfinished"] if name.startswith(".") else faults(path)
        old = not wrong and _is_first_format(path)
        state = "sound, as far as can be told: it has no checksums" if old else "sound"
        lines.append((name, size, wrong[0] if wrong else state))
    return lines


def _newest(
    run: Path,
    use: Callable[[Path, dict[str, Any]], Any],
    tell: Callable[[str], None],
    like: PyTree,
    parts: tuple[str, ...] | None = None,
    best: bool = False,
) -> Any:
    """What `use` makes of the newest sound checkpoint, or of the best one."""
    folder = run / FOLDER
    # Arrays are stored with little around them; rows of the replay perhaps twice.
    limit = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)) + (1 << 26)
    there = [folder / str(step) for step in reversed(steps(run))]
    if best:
        there = sorted(folder.glob(f"{_BEST}*"), key=_score, reverse=True)
        require(bool(there), f"The run {run} has no best checkpoint: no episode has ended yet.")
    for path in there:
        wrong = faults(path, parts, limit) if jax.process_index() == 0 else []
        if not mesh.agree(len(wrong)):  # in several processes the first one judges
            try:
                return use(path, _open(path, ()))
            except Damaged as found:
                wrong = [str(found)]
        tell(f"The checkpoint {path} is damaged: {'; '.join(wrong)}. It is passed over.")
    raise _none(run)


def _none(run: Path) -> JaxwmError:
    there = [f"{run / FOLDER / str(step)}" for step in steps(run)]
    if there:
        return JaxwmError(
            f"None of the checkpoints of the run {run} is sound ({', '.join(there)}). See `jaxwm "
            f"checkpoints {run}`; train again in another folder."
        )
    return JaxwmError(
        f"The run {run} has no checkpoint yet: it was stopped before the first one. Begin it again "
        f"with `jaxwm resume {run}`, with a smaller --save-every if need be."
    )


def _open(
    folder: Path, parts: tuple[str, ...] | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The manifest of a sound checkpoint; raises `Damaged` if it is not."""
    if _is_first_format(folder):
        return _first_format(folder)
    found = manifest.read(folder)
    manifest.check(folder, found, parts, limit)
    name = str(found.get("step"))
    if folder.name not in (name, _BEST + name):
        raise Damaged(f"it is the checkpoint of step {name}")
    return found


def _state(folder: Path, found: dict[str, Any], like: Any, config: RunConfig, accept: bool) -> Any:
    """The state in a checkpoint."""
    if found["format"] == 1:
        parts = {"params": like.agent.params, "rest": _without_params(like)}
        _check(folder, found, parts, config, accept)
        read = {name: _read(folder, found, name, part) for name, part in parts.items()}
        return _with_params(read["rest"], read["params"])
    axis, buffer = _axis(like), like.buffer
    try:
        written, pieces = int(found["replay"]["written"]), _pieces(found["replay"])
        leaves = dict(found["leaves"], replay=dict(found["replay"]["leaves"]))
        capacity = like.buffer.rows.is_first.shape[-1]
        if not all(0 <= a < b <= min(written, a + capacity) for a, b in pieces) or written >> 31:
            raise ValueError(pieces)
        size, blocks = _blocks(buffer, written)
    except manifest.UNREADABLE:
        raise Damaged("its manifest lacks the replay") from None
    parts = {"params": like.agent.params, "rest": _rest(like)}
    _check(folder, {**found, "leaves": leaves}, {**parts, "replay": buffer}, config, accept)
    state = _read(folder, found, "rest", parts["rest"])
    latents = arrays.empty(buffer.deter), arrays.empty(buffer.stoch)
    like_them = [tuple(arrays.resized(x, size, axis) for x in latents)] * len(blocks)
    stored = _read(folder, found, "latents", like_them) if blocks else []
    for first, block in zip(blocks, stored, strict=True):
        latents = arrays.put(latents, block, first, axis)
    filled = jax.tree.map(arrays.empty, buffer.rows)
    for first, stop in pieces:  # the oldest first: what has replaced a row comes later
        part = jax.tree.map(lambda x, n=stop - first: arrays.resized(x, n, axis), buffer.rows)
        filled = arrays.put(filled, _read(folder, found, _piece(first, stop), part), first, axis)
    state = state._replace(buffer=type(buffer)(filled, *latents))
    return _with_params(state, _read(folder, found, "params", parts["params"]))


def _read(folder: Path, found: dict[str, Any], name: str, like: PyTree) -> PyTree:
    """A part of a checkpoint, whose leaves are as they were when it was saved."""
    places = {number: arrays.place(leaf) for number, leaf in arrays.numbered(like).items()}
    small = _small_there(found, name, places)
    stored = {number: place for number, place in places.items() if number not in small}
    if small:
        size = sum(arrays.size(place) for place in small.values())
        stored[arrays.PACK] = np.broadcast_to(np.zeros((), np.uint8), (size,))
    path = _whole(folder / name)
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
    return arrays.join(like, got)


def _check_sizes(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises an error if arrays, or the blocks they are stored in, are larger than they should be.

    No memory is to be asked for on their word.
    """
    for number, place in here.items():
        shape, block = there[number].shape, there[number].storage.chunk_shape
        if tuple(shape) != place.shape or any(x > y for x, y in zip(block, shape, strict=True)):
            raise ValueError(f"{number} has shape {shape} in blocks of {block}, not {place.shape}")


def _check(
    folder: Path, found: dict[str, Any], parts: dict[str, Any], config: RunConfig, accept: bool
) -> None:
    """Raises an error unless configuration and leaves are those of the checkpoint."""
    _check_config(folder, found, config, accept)
    wrong = []
    for name, part in parts.items():
        here, there = dict(arrays.describe(part)), dict(found["leaves"][name])
        wrong += [
            f"{path}: {here.get(path, 'absent')} here, {there.get(path, 'absent')} there"
            for path in {**here, **there}
            if here.get(path) != there.get(path)
        ]
    if wrong:
        raise JaxwmError(
            f"The checkpoint {folder} is one of another configuration, or was made by another "
            f"version or on another kind of device. {few(wrong)}. Put {CONFIG} back as it was, or "
            "start a new run in another folder."
        )


def _check_config(folder: Path, found: dict[str, Any], config: RunConfig, accept: bool) -> None:
    """Raises an error unless the configuration is that of the checkpoint, or may be another."""
    stored = _configured(found["config"])
    same = dataclasses.replace(stored, **{name: getattr(config, name) for name in FREE})
    wrong = [] if accept else differences(config, same)
    if wrong:
        raise JaxwmError(
            f"The checkpoint {folder} is one of another configuration. {few(wrong)}. Put {CONFIG} "
            "back as it was, go on with --accept-changes if they are meant, or start a new run in "
            "another folder."
        )


def _configured(data: Any) -> RunConfig:
    """A configuration from JSON, also of earlier versions."""
    if isinstance(data, dict):
        if data.get("on_divergence") == "stop":
            data = {**data, "on_divergence": "abort"}
        data = _filled(data, _LATER)
        data = _with_schedule(data)
    return from_dict(RunConfig, data)


def _with_schedule(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a schedule in place of `anneal_steps`, as it was stored once."""
    match data:
        case {"agent": {"optim": {"anneal_steps": int(updates), **optim}, **agent}, **run}:
            rate = optim.get("learning_rate")
            if updates and isinstance(rate, int | float):
                falling = Schedule(rate, 0.1 * rate, updates=_unless_whole_run(updates, run))
                optim["learning_rate"] = dataclasses.asdict(falling)
            return {**run, "agent": {**agent, "optim": optim}}
    return data


def _unless_whole_run(updates: int, run: dict[str, Any]) -> int:
    """0, for the length of the run, if the run has as many updates."""
    match run:
        case {
            "steps": int(steps),
            "replay": {
                "train_ratio": int(ratio) | float(ratio),
                "batch_size": int(size),
                "batch_length": int(length),
            },
        } if size * length:
            return updates * (updates != int(steps * ratio / (size * length)))
    return updates


def _filled(data: Any, entries: dict[str, Any]) -> Any:
    """Tables with the entries that they lack."""
    if not isinstance(data, dict):
        return data
    tables = {
        k: _filled(data[k], v) for k, v in entries.items() if isinstance(v, dict) and k in data
    }
    return {**{k: v for k, v in entries.items() if not isinstance(v, dict)}, **data, **tables}


def _is_first_format(folder: Path) -> bool:
    """Whether a checkpoint is one of version 0.1, which had no checksums."""
    return (folder / "manifest" / "metadata").is_file() and not (folder / manifest.NAME).exists()


def _first_format(folder: Path) -> dict[str, Any]:
    """The manifest of such a checkpoint, as far as it had one."""
    try:
        manifest.ordinary(folder)
        found = read_json(folder / "manifest" / "metadata", manifest.LARGEST)
        leaves = {name: found[name] for name in ("params", "rest")}
        return {"format": 1, "step": int(folder.name), "config": found["config"], "leaves": leaves}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("its manifest cannot be read") from None


def _rest(state: Any) -> Any:
    return _without_params(state)._replace(buffer=())


def _without_params(state: Any) -> Any:
    return state._replace(agent=state.agent._replace(params=()))


def _with_params(state: Any, params: Params) -> Any:
    return state._replace(agent=state.agent._replace(params=params))


def _axis(state: Any) -> int:
    """The axis along which the replay's arrays hold rows."""
    return state.buffer.rows.is_first.ndim - 1


def _blocks(buffer: Any, written: int) -> tuple[int, range]:
    """The size of blocks of latents, an eighth of all, and where those with any in them begin.

    All are as large, so that a single program copies them; the last may go over the end.
    """
    rows, most = buffer.rows.is_first.shape[-1], buffer.stoch.shape[buffer.rows.is_first.ndim - 1]
    size = -(-most // 8)
    return size, range(0, min(most, -(-written // (rows // most))), size)


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


def _piece(first: int, stop: int) -> str:
    return f"rows-{first}-{stop}"


def _pieces(replay: dict[str, Any]) -> list[list[int]]:
    return [[int(first), int(stop)] for first, stop in replay["pieces"]]


def _score(folder: Path) -> float:
    try:
        return float(manifest.read(folder)["score"])
    except (Damaged, *manifest.UNREADABLE):
        return -math.inf


def _whole(path: Path) -> Path:
    """The whole path of a folder that Orbax is to use, which takes UTF-8 and nothing else."""
    path = path.resolve()
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise JaxwmError(
            f"The name of {path} has letters that are none in {sys.getfilesystemencoding()}, which "
            "is this system's encoding of names. Set PYTHONUTF8=1, or give the folder another name."
        ) from None
    return path


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove(folder: Path) -> None:
    """Removes a folder, which is gone for others from the first moment on."""
    gone = folder.with_name(f".{folder.name}.old")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _free(path: Path) -> Path:
    """The path, or if it is taken one like it."""
    taken = 0
    found = path
    while found.exists():
        taken += 1
        found = path.with_name(f"{path.name}.{taken}")
    return found


def _cause(error: Exception, folder: Path) -> str:
    """Why a save failed, in words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"the device has no memory for a copy ({str(error).splitlines()[0][:200]})"
    if full or "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return f"no space left, {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
