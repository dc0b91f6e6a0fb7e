"""Trains for an hour in a few processes, with saves, stops, evaluations and resumes: memory stays.

    python -m tests.faults.soak --count 60 --out benchmarks/results/reliability.jsonl

`--count` is minutes. Each process trains the demo for a quarter of them, with saves as often as
there; it is then asked to stop, the run is evaluated by another process, and resumed by the next.
After the first five minutes of a process (a third of its life, if that is less) the most memory
that it takes in the second half of what is left is less than 2 % above that in the first.
"""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.run import checkpoint
from jaxwm.run.log import read_metrics
from tests.faults.damage import Broken, command, holds, steady
from tests.faults.runs import CLI

TRAIN = ["train", "dreamer_v3", "--preset", "cartpole", "--steps", "100000000", "--run"]
_CYCLES = 4
_GROWTH = 0.02


def cycle(run: Path, seconds: float) -> dict[str, float]:
    """One process's life, and an evaluation; gives its memory and what it has done."""
    known = len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
    words = ["resume", str(run)] if known else [*TRAIN, str(run)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*CLI, *words], stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate()
    holds(process.returncode == 143, f"ended with {process.returncode}: {out[-2000:]}")
    done = subprocess.run(
        [*CLI, "eval", str(run), "--episodes", "5"], capture_output=True, text=True, check=False
    )
    holds(done.returncode == 0, f"cannot be evaluated: {done.stderr[-2000:]}")
    for step in checkpoint.steps(run):
        wrong = checkpoint.faults(run / "checkpoints" / str(step))
        holds(not wrong, f"checkpoint {step} is damaged: {wrong}")
    lines = read_metrics(run)[known:]
    times = np.array([line["time"] for line in lines])
    memory = np.array([line["memory/process"] for line in lines])
    settled = times[0] + min(300.0, seconds / 3)
    # A save gives back what is free, and the process takes it again until the next: the most that
    # it takes is what would grow.
    late = times >= (settled + times[-1]) / 2
    before, after = memory[(times >= settled) & ~late].max(), memory[late].max()
    return {
        "early_bytes": round(before),
        "late_bytes": round(after),
        "growth": round(float(after / before) - 1, 5),
        "steps": lines[-1]["step"] - lines[0]["step"],
        "updates": lines[-1]["updates"] - lines[0]["updates"],
    }


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many minutes; gives the line of results."""
    run, cycles, broken = folder / "run", [], []
    try:
        for _ in range(_CYCLES):
            cycles.append(cycle(run, 60 * count / _CYCLES))
            print(time.strftime("%H:%M:%S"), cycles[-1], flush=True)
            growth = cycles[-1]["growth"]
            holds(growth < _GROWTH, f"the memory of a process has grown by {growth:.1%}")
        told = [line["step"] for line in steady(run)]
        whole = list(range(told[0], told[-1] + 1, told[0]))
        holds(told == whole, "metrics.jsonl has a gap or a line twice")
    except Broken as error:
        broken.append(str(error))
    return {"test": "soak", "minutes": count, "cycles": cycles, "broken": broken}


if __name__ == "__main__":
    command(__doc__, 60, measure)
