"""Writes the checkpoints of a run while the run continues.

Two are kept. A new checkpoint takes rows over from the one before the last, as hard links where
the file system has them; that one is removed when the new one is complete. So the two share no
file, and damage to one never reaches the other.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxwm.config import to_dict
from jaxwm.recipes import RunConfig
from jaxwm.run import arrays, log, manifest, parts
from jaxwm.run.checkpoint import BEST, FOLDER, LEFT_OVER, remove, score, steps, whole_path
from jaxwm.run.manifest import Damaged
from jaxwm.train import processes

KEPT = 2
_MOST_PIECES = 64  # of the replay's rows; beyond, they are written again as one


class Saver:
    """Saves one run; use it in a `with` statement.

    A save that fails leaves the earlier checkpoints as they are, and is reported.

    Args:
      run: the run's folder.
      config: the run.
      tell: gets a sentence about a save that failed.
      start: the step that the run continues from, see `rewind`; None for its newest checkpoint.

    Attributes:
      failed: whether the last save failed.
    """

    def __init__(
        self, run: Path, config: RunConfig, tell: Callable[[str], None], start: int | None = None
    ):
        self._run, self._config, self._tell = run, config, tell
        self._folder = whole_path(run / FOLDER)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._job: concurrent.futures.Future[None] | None = None
        self._anew = self._has_failed = False
        self.failed = False
        if jax.process_index() > 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        if start is not None:
            self.rewind(start)

    def __enter__(self) -> "Saver":
        self._speak = _silence()
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._thread.shutdown()
        if not self._has_failed:  # futures of a failed save may report at any time
            self._speak()

    def wait(self) -> None:
        """Returns once the save in progress has reached the disk, or has failed."""
        if self._job is not None:
            self._job.result()
            self._job = None

    def rewind(self, step: int) -> None:
        """Sets aside checkpoints of later steps than the run continues from: they are damaged."""
        if jax.process_index() > 0:
            return
        for later in steps(self._run):
            if later > step:
                (self._folder / str(later)).rename(_free(self._folder / f"{later}.damaged"))

    def save(self, step: int, state: Any, score: float = math.nan) -> None:
        """Starts to write a checkpoint, once the previous one is written.

        Args:
          step: environment steps of one seed so far.
          state: the `TrainState`; it may be overwritten when this returns.
          score: mean return of the episodes since the previous checkpoint, NaN if none ended.
        """
        self.wait()
        if (self._folder / str(step)).exists():
            self.failed = False
            return
        try:
            copies, about, base = self._prepare(step, state)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                raise
            self._report_failure(step, error)
            return
        about["score"] = score if math.isfinite(score) else None
        write = functools.partial(self._write, step, copies, about, base)
        if jax.process_count() > 1:
            write()  # in all processes at the same time
        else:
            self._job = self._thread.submit(write)

    def _prepare(self, step: int, state: Any) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
        """Copies of the parts to write, what the manifest says, and whose rows to take over."""
        buffer, axis = state.buffer, parts.ring_axis(state)
        written, capacity = int(state.clock.cursor.written), buffer.rows.is_first.shape[-1]
        base, pieces = self._rows_on_disk(written - capacity)
        first = pieces[-1][1] if pieces else max(0, written - capacity)
        whole = {parts.PARAMS: state.agent.params, parts.REST: parts.rest(state)}
        about = {
            "step": step,
            "config": to_dict(self._config),
            "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
            "leaves": {name: arrays.describe(part) for name, part in whole.items()},
        }
        copies = {name: arrays.copy(part) for name, part in whole.items()}
        size, blocks = parts.blocks(buffer, written)
        memo = [arrays.take(buffer.memo, x, size, axis) for x in blocks]
        copies[parts.MEMO] = arrays.numbered(memo)
        if written > first:
            pieces.append([first, written])
            new = arrays.take(buffer.rows, first, written - first, axis)
            copies[parts.piece(first, written)] = arrays.numbered(new)
        about["replay"] = {"written": written, "pieces": pieces, "leaves": arrays.describe(buffer)}
        return {name: part for name, part in copies.items() if part}, about, base

    def _rows_on_disk(self, oldest: int) -> tuple[Path | None, list[list[int]]]:
        """The checkpoint before the last, and its pieces of rows that are not all overwritten."""
        complete = steps(self._run)
        base, pieces = None, []
        if len(complete) >= KEPT and not self._anew:
            base = self._folder / str(complete[-KEPT])
            try:
                pieces = parts.pieces(manifest.read(base)["replay"])
            except Damaged:
                base = None
        pieces = [piece for piece in pieces if piece[1] > oldest]
        if len(pieces) > _MOST_PIECES:
            base, pieces = None, []
        if jax.process_count() > 1:  # the others may have looked at another moment
            first = processes.agree(pieces[0][0] if pieces else -1)
            stop = processes.agree(pieces[-1][1] if pieces else -1)
            pieces = pieces if jax.process_index() == 0 else [[first, stop]] * (stop >= 0)
        return base, pieces

    def _write(
        self, step: int, copies: dict[str, Any], about: dict[str, Any], base: Path | None
    ) -> None:
        """Writes a checkpoint, and removes the oldest one."""
        work = self._folder / f".{step}.saving"
        try:
            self._write_all(work, copies, about, base)
            if jax.process_index() == 0:
                work.rename(self._folder / str(step))
                manifest.settle(self._folder)
                self._remember_best(step, about["score"])
                for old in steps(self._run)[:-KEPT]:
                    remove(self._folder / str(old))
            processes.wait(f"saved {step}")
            self._anew = self.failed = False
        except Exception as error:
            if jax.process_count() > 1:
                raise
            self._anew = True
            shutil.rmtree(work, ignore_errors=True)
            self._report_failure(step, error)
        finally:
            copies.clear()
            _return_memory()

    def _write_all(
        self, work: Path, copies: dict[str, Any], about: dict[str, Any], base: Path | None
    ) -> None:
        """Writes and seals everything that a checkpoint holds, under another name."""
        first = jax.process_index() == 0
        if first:
            self._ensure_space(copies)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        processes.wait(f"begun {work.name}")
        packed = {name: arrays.small(part) for name, part in copies.items()}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            for name, part in copies.items():
                stored = arrays.pack(part, packed[name])
                checkpointer.save(work / name, args=ocp.args.StandardSave(stored))  # type: ignore
        if not first:
            return
        known, sums = {}, {name: arrays.sums(part) for name, part in copies.items()}
        if base is not None:
            before = manifest.read(base)
            sums, packed = before["sums"] | sums, before.get("packed", {}) | packed
            for piece in parts.pieces(about["replay"]):
                name = parts.piece(*piece)
                if name not in copies:
                    shutil.copytree(base / name, work / name, copy_function=_link)
                    known |= {x: y for x, y in before["files"].items() if x.startswith(f"{name}/")}
            sums = {name: x for name, x in sums.items() if (work / name).is_dir()}
            packed = {name: packed.get(name, []) for name in sums}
        manifest.settle(self._run / log.FILE)  # no checkpoint is ahead of the metrics
        manifest.seal(work, {**about, "sums": sums, "packed": packed}, known)

    def _ensure_space(self, copies: dict[str, Any]) -> None:
        """Raises an error if the disk has too little space, before anything is written."""
        leaves = [leaf for part in copies.values() for leaf in jax.tree.leaves(part)]
        needed = sum(leaf.nbytes for leaf in leaves)
        if shutil.disk_usage(self._folder).free < 1.1 * needed + (1 << 20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _remember_best(self, step: int, value: float | None) -> None:
        """Keeps the networks of a checkpoint beside it, if their returns are the best so far."""
        before = {path: score(path) for path in self._folder.glob(f"{BEST}*")}
        if value is None or value <= max(before.values(), default=-math.inf):
            return
        source, work = self._folder / str(step), self._folder / f".{BEST}{step}.saving"
        found = manifest.read(source)
        about = {name: found[name] for name in ("step", "score", "config", "versions")}
        names = [name for name in ("leaves", "sums", "packed") if name in found]
        about |= {name: {parts.PARAMS: found[name][parts.PARAMS]} for name in names}
        try:
            shutil.copytree(source / parts.PARAMS, work / parts.PARAMS)
            manifest.seal(work, about)
            work.rename(_free(self._folder / f"{BEST}{step}"))
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            cause = _cause(error, self._folder)
            self._tell(f"The best networks so far, of step {step:,}, could not be kept: {cause}.")
            return
        for path in before:
            remove(path)

    def _report_failure(self, step: int, error: Exception) -> None:
        self.failed = self._has_failed = True
        there = steps(self._run)
        stays = f"that of step {there[-1]:,} stays" if there else "there is none yet"
        self._tell(
            f"The checkpoint of step {step:,} could not be written to {self._folder}: "
            f"{_cause(error, self._folder)}. The run tries again at the next one; {stays}."
        )


# Orbax's own log, and that of futures whose loop has ended.
_LOUD = ("absl", "asyncio", "concurrent.futures")


def _silence() -> Callable[[], None]:
    """Stops Orbax, and the futures that it leaves, from printing the errors that it raises.

    Threads of TensorStore that find their loop closed by a failed save have nowhere to raise their
    errors.

    Returns:
      A function that ends the silence.
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


def _return_memory() -> None:
    """Gives freed memory back to the system, where the C library is glibc.

    A save copies whole arrays in threads of XLA and Orbax, other ones each time, and glibc keeps
    what they freed: without this a process takes twice the memory.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _free(path: Path) -> Path:
    """The path, or one like it if it is taken."""
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
