"""Fills the disk under a run: it goes on or ends in words, and loses nothing that was saved.

    python -m tests.faults.disk --count 20 --out benchmarks/results/reliability.jsonl

Every run has a small disk of its own (a tmpfs, so this needs root, or `unshare --user
--map-root-user --mount` before the command). At a random moment whatever is free is taken, and
for some runs given back later. A run that ends gets more room, goes on with `jaxwm resume`, and
must then be, bit for bit, the run that had room all along.
"""

import collections
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.run import checkpoint
from tests.faults.damage import Answer, command, holds, small, steady
from tests.faults.runs import CLI, Truth, words

CONFIG = small(steps=6000, save_every=300)
# When the disk becomes full.
MOMENTS = ("at the start", "after lines", "while saving", "while saving", "at the end")
_SPARE = 1 << 20  # bytes without which no save is begun
_NO_DISK = "A disk of its own could not be mounted, so nothing was tested"


class Disk:
    """A disk of so many bytes, of which a part can be taken.

    Args:
      place: an empty folder, where it is mounted.
      size: bytes.
    """

    def __init__(self, place: Path, size: int):
        self.place, self._filler = place, place / "filler"
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)

    def fill(self) -> None:
        """Takes what is free."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """Gives back what was taken."""
        self._filler.unlink(missing_ok=True)

    def grow(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", self.place)

    def close(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)


def _mount(*words: Any) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{_NO_DISK}: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Disk]:
    """A `Disk`, while the body runs."""
    place.mkdir()
    disk = Disk(place, size)
    try:
        yield disk
    finally:
        disk.close()


def trial(truth: Truth, disk: Disk, room: int, random: np.random.Generator) -> str:
    """One run on a disk that fills up.

    Args:
      truth: the run that has all the room it needs.
      disk: where this one goes.
      room: bytes that are enough for it.
      random: draws when the disk is full, and whether and when it no longer is.

    Returns:
      "went on" or "ended".

    Raises:
      Broken: if a promise does not hold.
    """
    run = disk.place / "run"
    moment = MOMENTS[random.integers(len(MOMENTS))]
    lines = int(random.integers(CONFIG.steps // CONFIG.log_every))
    freed = float(random.uniform(0, 2)) if random.random() < 0.5 else np.inf  # seconds later
    with subprocess.Popen(
        [*CLI, *words(CONFIG, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not _has_come(moment, lines, run):
            time.sleep(0.001)
        until = time.monotonic() + freed
        while process.poll() is None and time.monotonic() < until:
            disk.fill()
            time.sleep(0.05)
        if freed < np.inf:
            disk.free()
        answer = Answer(0, *process.communicate())._replace(code=process.returncode)
    failed = answer.out.count("could not be written")
    when = f"{moment} ({lines}), freed after {freed:.1f} s"
    print(f"{when}: exit code {answer.code}, {failed} saves failed", flush=True)
    holds("Traceback" not in answer.out + answer.err, f"a traceback: {answer.err[-2000:]}")
    for line in answer.out.splitlines():
        clear = "could not be written" not in line or "no space left" in line
        holds(clear, f"no cause is told: {line}")
    for step in checkpoint.steps(run):
        wrong = checkpoint.faults(run / "checkpoints" / str(step))
        holds(not wrong, f"checkpoint {step} is damaged: {wrong}")
    if (run / "metrics.jsonl").exists():
        steady(run)  # whole lines only
    if answer.code == 0:
        truth.compare(run)
        return "went on"

    answer.refusal()
    disk.free()
    disk.grow(room)
    again = subprocess.run([*CLI, *words(CONFIG, run)], capture_output=True, text=True, check=False)
    holds(again.returncode == 0, f"with more room it does not go on: {again.stderr[-2000:]}")
    truth.compare(run)
    return "ended"


def _has_come(moment: str, lines: int, run: Path) -> bool:
    """Whether a run is where its disk becomes full."""
    if moment == "at the end":
        return (run / "checkpoints" / str(CONFIG.steps)).exists()
    if moment == "at the start":
        return True
    there = run / "metrics.jsonl"
    come = there.exists() and there.read_bytes().count(b"\n") >= lines
    return come and (moment == "after lines" or any(run.glob("checkpoints/.*.saving")))


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many runs on full disks; gives the line of results."""
    with mounted(folder / "try", 1 << 20):
        pass  # or it ends here, in words
    truth = Truth(CONFIG, folder / "truth")
    newest = folder / "truth" / "checkpoints" / str(checkpoint.latest(folder / "truth"))
    bytes_of_one = sum(512 * x.stat().st_blocks for x in newest.rglob("*"))
    random, tally, broken = np.random.default_rng(seed), collections.Counter(), []
    for number in range(count):
        size = _SPARE + int(bytes_of_one * random.uniform(1.5, 6))
        with mounted(folder / f"disk-{number}", size) as disk:
            try:
                tally[trial(truth, disk, size + 8 * bytes_of_one, random)] += 1
            except Exception as error:
                broken.append(f"disk {number}: {type(error).__name__}: {error}")
                print(broken[-1], flush=True)
    return {
        "test": "disk",
        "count": count,
        "checkpoint_bytes": bytes_of_one,
        "went_on": tally["went on"],
        "ended_and_resumed": tally["ended"],
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 20, measure)
