"""Lets two processes want one run folder: exactly one gets it, and notices nothing of the other.

    python -m tests.faults.races --count 50 --out benchmarks/results/reliability.jsonl

One race in five is one of two real runs; the metrics of the one that goes on are compared with
those of a run that was alone. In the others this process holds the folder's lock, and a real
`jaxwm train` or `jaxwm resume` must leave at once.
"""

import collections
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxwm.run import lock
from jaxwm.run.log import read_metrics
from jaxwm.run.loop import run as train_run
from tests.faults.damage import Answer, command, copy, holds, plain, small, steady, train_words
from tests.faults.runs import CLI

CONFIG = small(steps=4000, save_every=1000, eval_episodes=0)
HALF = small(steps=2000, save_every=1000, eval_episodes=0)
_LIMIT = 300.0  # seconds


def held(run: Path, words: list[str], nojax: Path) -> float:
    """A process that finds the folder locked by this one; gives the seconds it took.

    It cannot import jax, which would take longer than all the rest: `nojax` holds one that fails.
    """
    environ = {**os.environ, "PYTHONPATH": str(nojax)}
    with lock.hold(run):
        before, begun = _contents(run), time.monotonic()
        done = subprocess.run(
            [*CLI, *words], capture_output=True, text=True, check=False, env=environ
        )
        took = time.monotonic() - begun
        holds(_contents(run) == before, "the one that was refused has changed the folder")
    _is_named(os.getpid(), Answer(done.returncode, done.stdout, done.stderr))
    return took


def real(run: Path, words: list[list[str]], lines: int, truth: list[dict[str, Any]]) -> None:
    """Two runs, of which the second starts once there are so many lines of metrics."""
    with _process(words[0]) as one:
        _wait(lambda: _lines(run) >= lines)
        with _process(words[1]) as two:
            _wait(lambda: one.poll() is not None or two.poll() is not None)
            loser, winner = (one, two) if one.poll() is not None else (two, one)
            _is_named(winner.pid, Answer(loser.returncode, *loser.communicate()))
            more = _lines(run) + 5
            _wait(lambda: winner.poll() is not None or _lines(run) >= more)
            seen = plain(read_metrics(run))
            holds(len(seen) >= more, f"the winner went no further: {winner.poll()}")
            holds(seen == truth[: len(seen)], "the winner's metrics are not those of a run alone")


@contextlib.contextmanager
def _process(words: list[str]) -> Iterator[subprocess.Popen]:
    """A command, which is killed at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*CLI, *words], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _is_named(winner: int, loser: Answer) -> None:
    """Holds that the loser was refused, and was told by whom."""
    told, who = loser.refusal(), f"process {winner} on {socket.gethostname()}"
    holds(who in told, f"that {who} has the folder is not told: {told}")


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + _LIMIT
    while not done():
        holds(time.monotonic() < until, f"nothing has happened in {_LIMIT:.0f} s")
        time.sleep(0.01)


def _lines(run: Path) -> int:
    """Whole lines of metrics so far."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _contents(run: Path) -> dict[str, bytes]:
    files = [x for x in run.rglob("*") if x.is_file()]
    return {str(x.relative_to(run)): x.read_bytes() for x in files}


def measure(count: int, seed: int, folder: Path, reals: int | None = None) -> dict[str, Any]:
    """So many races, `reals` of which are between two real runs; gives the line of results."""
    reals = -(-count // 5) if reals is None else reals
    nojax, truth = folder / "nojax", []
    nojax.mkdir(parents=True)
    (nojax / "jax.py").write_text('raise ImportError("it is too early for jax")\n', "utf-8")
    if reals:
        train_run(CONFIG, folder / "truth", quiet=True)
        train_run(HALF, folder / "half", quiet=True)
        truth = steady(folder / "truth")
    tally, broken, slowest = collections.Counter(), [], 0.0
    for number in range(count):
        run = folder / f"run-{number}"
        train, resume = train_words(CONFIG, run), ["resume", str(run)]
        kind = "held"
        try:
            if number >= reals:
                slowest = max(slowest, held(run, [train, resume][number % 2], nojax))
            elif number % 3 == 0:
                kind = "two trains"
                real(run, [train, train], 0, truth)
            elif number % 3 == 1:
                kind = "two resumes"
                longer = [*resume, "--steps", str(CONFIG.steps)]
                copy(folder / "half", run)
                real(run, [longer, longer], 0, truth)
            else:
                kind = "resume beside train"
                real(run, [train, resume], 1, truth)
            tally[kind] += 1
        except Exception as error:
            broken.append(f"{kind} {number}: {type(error).__name__}: {error}")
            print(broken[-1], flush=True)
    return {
        "test": "races",
        "count": count,
        **{kind.replace(" ", "_"): number for kind, number in tally.items()},
        "slowest_refusal_seconds": round(slowest, 2),
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 50, measure)
