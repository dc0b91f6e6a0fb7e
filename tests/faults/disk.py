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

from jaxwm import checkpoint, train
from jaxwm.run import run as train_run
from tests.faults.damage import Answer, bits, command, holds, small, steady, train_words

CONFIG = small(steps=1200, save_every=120)
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


class Truth:
    """The run that has all the room it needs.

    Args:
      folder: where it goes.
    """

    def __init__(self, folder: Path):
        train_run(CONFIG, folder, quiet=True)
        self._like = train.build(CONFIG).shapes()
        self._state, self._lines = self._last(folder), steady(folder)
        newest = folder / "checkpoints" / str(checkpoint.latest(folder))
        self.size = sum(x.stat().st_size for x in newest.rglob("*"))

    def _last(self, run: Path) -> str:
        return bits(checkpoint.restore(run, self._like, CONFIG, lambda text: holds(False, text)))

    def compare(self, run: Path) -> None:
        """Holds that another run has come to the same end."""
        holds(steady(run) == self._lines, "its metrics are not those of the run with room")
        holds(self._last(run) == self._state, "its state is not that of the run with room")


def trial(truth: Truth, disk: Disk, random: np.random.Generator) -> str:
    """One run on a disk that fills up; gives "went on" or "ended"."""
    run = disk.place / "run"
    full = int(random.integers(-1, CONFIG.steps // CONFIG.log_every))  # lines of metrics by then
    freed = float(random.uniform(0, 4)) if random.random() < 0.5 else np.inf  # seconds later
    with subprocess.Popen(
        [sys.executable, "-m", "jaxwm.cli", *train_words(CONFIG, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and _lines(run) < full:
            time.sleep(0.01)
        until = time.monotonic() + freed
        while process.poll() is None and time.monotonic() < until:
            disk.fill()
            time.sleep(0.05)
        if freed < np.inf:
            disk.free()
        answer = Answer(0, *process.communicate())._replace(code=process.returncode)
    print(f"full after {full} lines, freed after {freed:.1f} s: {answer.code}", flush=True)
    holds("Traceback" not in answer.out + answer.err, f"a traceback: {answer.err[-2000:]}")
    for line in answer.out.splitlines():
        failed = "could not be written" in line
        holds(not failed or "no space left" in line.lower(), f"no cause is told: {line}")
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
    disk.grow(8 * truth.size)
    begun = (run / checkpoint.CONFIG).exists()
    words = ["resume", str(run)] if begun else train_words(CONFIG, run)
    again = subprocess.run(
        [sys.executable, "-m", "jaxwm.cli", *words], capture_output=True, text=True, check=False
    )
    holds(again.returncode == 0, f"with more room it does not go on: {again.stderr[-2000:]}")
    truth.compare(run)
    return "ended"


def _lines(run: Path) -> int:
    """Lines of metrics so far; -1 if there is no file yet."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return -1


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many runs on full disks; gives the line of results."""
    with mounted(folder / "try", 1 << 20):
        pass  # or it ends here, in words
    truth = Truth(folder / "truth")
    random, tally, broken = np.random.default_rng(seed), collections.Counter(), []
    for number in range(count):
        size = int(truth.size * random.uniform(1.5, 5))
        with mounted(folder / f"disk-{number}", size) as disk:
            try:
                tally[trial(truth, disk, random)] += 1
            except Exception as error:
                broken.append(f"disk {number}: {type(error).__name__}: {error}")
                print(broken[-1], flush=True)
    return {
        "test": "disk",
        "count": count,
        "checkpoint_bytes": truth.size,
        "went_on": tally["went on"],
        "ended_and_resumed": tally["ended"],
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 20, measure)
