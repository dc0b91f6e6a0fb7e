"""Asks real runs to stop at random moments, by SIGTERM and SIGINT: they save, and lose nothing.

    python -m tests.faults.signals --count 100 --out benchmarks/results/reliability.jsonl

A run is asked and resumed until it has ended by itself; its state and metrics must then be, bit
for bit, those of a run that nobody has asked. One in ten is asked before it trains, and has nothing
to save; one in ten is asked twice, and need not have saved.
"""

import collections
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.run import checkpoint
from tests.faults.damage import Broken, command, holds, small
from tests.faults.runs import CLI, Truth, words

CONFIG = small(steps=20_000, save_every=5_000, eval_episodes=1)
_LIMIT = 10.0  # seconds from the signal to the end
_AT_ONCE = 2.0  # the same for the second signal
_PATIENCE = 120.0  # seconds after which a process is taken to hang, and is killed


def ask(truth: Truth, run: Path, random: np.random.Generator, kind: str) -> tuple[bool, float]:
    """A process that is asked to stop; whether it had ended before, and the seconds it took."""
    number = [signal.SIGTERM, signal.SIGINT][random.integers(2)]
    told = ""
    with subprocess.Popen(
        [*CLI, *words(truth.config, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        watchdog = threading.Timer(_PATIENCE, process.kill)
        watchdog.start()
        if kind == "early":
            time.sleep(random.uniform(0.5, 2))
        else:
            for line in process.stdout:
                told += line
                if line.startswith("Compiled in"):
                    break
            time.sleep(random.uniform(0.2, 6))
        asked = time.monotonic()
        process.send_signal(number)
        if kind == "twice":
            time.sleep(0.2)
            asked = time.monotonic()
            process.send_signal(number)
        told += process.stdout.read()
        code, took = process.wait(), time.monotonic() - asked
        watchdog.cancel()
    if code == 0:
        return True, 0.0
    holds(code == 128 + number, f"{number.name} ended it with {code}: {told[-2000:]}")
    limit = _AT_ONCE if kind == "twice" else _LIMIT
    holds(took <= limit, f"{took:.1f} s after {number.name}")
    holds("Traceback" not in told, f"a traceback: {told[-2000:]}")
    saved = re.search(rf"{number.name} at step ([\d,]+): saved", told)
    if saved:
        step = int(saved[1].replace(",", ""))
        holds(checkpoint.latest(run) == step, f"step {step} is not what was saved last")
    elif kind == "once":
        # Between training and the end of the evaluation everything is saved already.
        done = "Trained." in told
        holds(done, f"nothing was saved: {told[-2000:]}")
    return False, took


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many signals, over as many runs as it takes; gives the line of results."""
    truth = Truth(CONFIG, folder / "truth")
    random, tally = np.random.default_rng(seed), collections.Counter()
    seconds, broken = [], []
    while tally["signals"] < count:
        run = folder / f"run-{tally['runs']}"
        tally["runs"] += 1
        try:
            ended = False
            while not ended and tally["signals"] < count:
                kind = {0: "early", 5: "twice"}.get(tally["signals"] % 10, "once")
                ended, took = ask(truth, run, random, kind)
                if not ended:
                    tally["signals"] += 1
                    tally[kind] += 1
                    seconds += [took] if kind == "once" else []
            done = subprocess.run(
                [*CLI, *words(truth.config, run)], capture_output=True, text=True, check=False
            )
            holds(done.returncode == 0, f"does not go on: {done.stderr[-2000:]}")
            truth.compare(run)
        except (Broken, ValueError) as error:
            broken.append(f"{run.name}: {error}")
            print(broken[-1], flush=True)
            tally["signals"] += 1
        print(f"{time.strftime('%H:%M:%S')} {dict(tally)}", flush=True)
    return {
        "test": "signals",
        "count": count,
        **tally,
        "median_seconds": round(float(np.median(seconds)), 2),
        "slowest_seconds": round(max(seconds), 2),
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 100, measure)
