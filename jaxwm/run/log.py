"""What a run tells while it trains: `metrics.jsonl`, a line on the console, TensorBoard.

Metric names are paths: `episode/return`, `episode/length`, `loss/<name>`, `loss/total`,
`grad_norm`, `episode/count`, `latent/<name>`, `dream/<name>`, `policy/entropy`, `replay/size`,
`memory/process` (resident bytes of the process that trains). With simulators on the host also
`host/waiting`, the share of the time spent waiting for them, `host/faults`, how many they have had
since the start, and `memory/simulators` (resident bytes of their processes). `updates/refused`
counts updates that were not finite and so never taken. Each value is one number or one per member.
A value that is not finite is left out of the file (`episode/return` is NaN where no episode ended
since the last write).

`metrics.jsonl` holds one JSON object per write and member (seed, and setting of a sweep): `step`
(environment steps of one member), `updates`, `seed` (counted from 0), `setting` (of a sweep),
`time` (seconds of training, over all resumes), then the metrics. Lines are appended at every write,
so a killed run loses at most a half last line. Those that a full disk does not take are kept, and
written later.
"""

import collections
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxwm.config import replace_file
from jaxwm.types import JaxwmError

FILE = "metrics.jsonl"
_PAUSE = 3.0  # seconds between two plain lines


class Logger:
    """Writes the metrics of one run; use it in a `with` statement.

    Write before saving a checkpoint of the same step: then a resumed run, which drops the lines
    after its checkpoint, leaves neither a gap nor a line twice.

    Args:
      folder: the run's folder; made if absent.
      total_steps: environment steps per member at which the run ends.
      seeds: number of seeds trained side by side.
      settings: the setting of each member of a sweep, all seeds of one before the next; empty
        for no sweep.
      tensorboard: whether to write TensorBoard event files into `folder` too.
      console: where lines go; None is standard output. A terminal shows a progress bar,
        anything else a plain line every few seconds.
      resume_step: step of the checkpoint a resumed run starts from; lines after it are dropped.
        None is a new run.
      clock: seconds that only grow; a test may bring its own.

    Raises:
      JaxwmError: if a new run finds metrics in its folder, or a resumed one unreadable ones.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        seeds: int = 1,
        settings: Sequence[str] = (),
        tensorboard: bool = False,
        console: Console | None = None,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        path = self._path = folder / FILE
        kept = []
        if resume_step is not None:
            kept = _drop_after(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise JaxwmError(
                f"{folder} already holds the metrics of a run. Resume that run, choose another "
                "folder, or delete it."
            )
        self._total, self._seeds, self._clock = total_steps, seeds, clock
        self._settings, self._count = settings, len(settings) or seeds
        self._start = clock() - (kept[-1].get("time", 0.0) if kept else 0.0)
        self.last_step = kept[-1]["step"] if kept else 0  # of the last line
        self._waiting = b""
        self._open()
        self._board = _board(folder) if tensorboard else None
        self._console = console or Console()
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("starting", total=total_steps) if self._bar else None
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=20)
        self._returns = np.full(self._count, np.nan)
        self._line, self._told, self._told_at = "", True, -np.inf

    def __enter__(self) -> "Logger":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(
        self, step: int | np.integer, updates: int | np.integer, metrics: Mapping[str, Any]
    ) -> None:
        """Writes one line per member, and tells the console.

        Args:
          step: environment steps of one member so far.
          updates: gradient steps of one member so far.
          metrics: per name one number, or an array of shape (members,).

        Raises:
          JaxwmError: if a metric has another shape.
        """
        step, updates, now = int(step), int(updates), self._clock()
        columns = {name: self._per_member(name, value) for name, value in metrics.items()}
        lines = []
        for i in range(self._count):
            line: dict[str, Any] = {"step": step, "updates": updates, "seed": i % self._seeds}
            line |= {"setting": self._settings[i]} if self._settings else {}
            line["time"] = round(now - self._start, 3)
            line |= {k: _number(v[i]) for k, v in columns.items() if np.isfinite(v[i])}
            lines.append(json.dumps(line, allow_nan=False) + "\n")
        self._waiting += "".join(lines).encode()
        self.last_step = step
        if not self.flush():
            self._console.print(f"{self._path} takes no more; its lines are kept for later.")
        if self._board:
            _write_board(self._board, step, columns, self._names())
        self._marks.append((now, step, updates))
        ended = columns.get("episode/return", np.full(self._count, np.nan))
        self._returns = np.where(np.isfinite(ended), ended, self._returns)
        self._line = self._summary(columns.get("loss/total"))
        self._tell(step, now)

    def flush(self) -> bool:
        """Whether all lines are in the file now; if not, none of those that were waiting is."""
        done = 0
        try:
            while done < len(self._waiting):
                done += self._file.write(self._waiting[done:])
        except OSError:
            self._file.truncate(self._size)
            return False
        self._size, self._waiting = self._size + done, b""
        return True

    def rewind(self, step: int) -> None:
        """Drops the lines after a step, where the run begins again."""
        self._file.close()
        self._waiting = b""
        kept = _drop_after(self._path, step)
        self.last_step = kept[-1]["step"] if kept else 0
        self._open()

    def close(self) -> None:
        """Tells the last line if it was held back, and closes the files."""
        self.flush()
        if self._bar:
            self._bar.stop()
        elif not self._told:
            self._print()
        if self._board:
            self._board.close()
        self._file.close()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._size = self._path.stat().st_size

    def _names(self) -> list[str]:
        """What tells each member from the others; "" if there is only one."""
        seeds = [f"seed_{i % self._seeds}" if self._seeds > 1 else "" for i in range(self._count)]
        settings = self._settings or [""] * self._count
        return ["/".join(filter(None, pair)) for pair in zip(settings, seeds, strict=True)]

    def _per_member(self, name: str, value: Any) -> np.ndarray:
        value = np.asarray(value)
        if value.shape not in ((), (self._count,)):
            raise JaxwmError(
                f"Metric {name!r} has shape {value.shape}; it should be one number or an array of "
                f"shape ({self._count},), one number per member."
            )
        return np.broadcast_to(value, (self._count,))

    def _summary(self, loss: np.ndarray | None) -> str:
        """The last write in one line; means over members, speeds over the last few writes."""
        (then, step_then, updates_then), (now, step, updates) = self._marks[0], self._marks[-1]
        parts = [f"step {step:,}/{self._total:,}", f"updates {updates:,}"]
        if np.isfinite(self._returns).any():
            parts.append(f"return {_short(np.nanmean(self._returns))}")
        if loss is not None and np.isfinite(loss).any():
            parts.append(f"loss {_short(np.nanmean(loss))}")
        if now > then and step > step_then:
            speed = (step - step_then) / (now - then)
            parts.append(f"{_short(speed)} steps/s")
            parts.append(f"{_short((updates - updates_then) / (now - then))} updates/s")
            parts.append(f"eta {_duration(max(self._total - step, 0) / speed)}")
        return "  ".join(parts)

    def _tell(self, step: int, now: float) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, description=self._line)
            return
        self._told = now - self._told_at >= _PAUSE
        if self._told:
            self._told_at = now
            self._print()

    def _print(self) -> None:
        self._console.print(self._line, highlight=False, markup=False, soft_wrap=True)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in order; a half last line is left out.

    Args:
      run_folder: the folder given to `Logger`.

    Returns:
      One dict per write and member, with `step`, `updates`, `seed`, `time` and the metrics.

    Raises:
      JaxwmError: if there is no such file, or a line before the last is not JSON.
    """
    path = run_folder / FILE
    try:
        raw = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise JaxwmError(f"{run_folder} is not the folder of a run: it has no {FILE}.") from None
    lines = [(number, line) for number, line in enumerate(raw, start=1) if line.strip()]
    read = []
    for number, line in lines:
        try:
            read.append(json.loads(line))
        except (ValueError, RecursionError):
            if number != lines[-1][0]:
                raise JaxwmError(
                    f"{path}, line {number}, is not JSON: {line[:60]!r}. The file was changed or "
                    "damaged; delete that line to go on without it."
                ) from None
    return read


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines after `step` (and a half last one), all at once; returns the rest."""
    if not path.exists():
        return []
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _bar(console: Console) -> Progress:
    columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
    return Progress(*columns, console=console, refresh_per_second=4)


def _board(folder: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder))


def _write_board(board: Any, step: int, columns: dict[str, np.ndarray], members: list[str]) -> None:
    for name, values in columns.items():
        for i in np.flatnonzero(np.isfinite(values)):
            tag = f"{name}/{members[i]}" if members[i] else name
            board.add_scalar(tag, float(values[i]), step)
    board.flush()


def _number(value: np.generic) -> int | float:
    """A JSON number: integers whole, the rest with six significant digits."""
    return int(value) if value.dtype.kind in "biu" else float(f"{float(value):.6g}")


def _short(value: float | np.floating) -> str:
    """Three digits or so: 0.0123, 8.13, 40.2, 1,234."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10 or value == 0:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Minutes and seconds as 1:20, with hours as 2:01:20."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
