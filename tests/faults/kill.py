"""Kills real runs at random moments, and resumes them: nothing that was saved is ever lost.

    python -m tests.faults.kill --count 200 --out benchmarks/results/reliability.jsonl

The moments are spread over ten seconds: in every other kill from the start of a process on
(imports, compiling, reading a checkpoint), else from its first line of metrics on (training,
saving, removing old checkpoints). A run is killed and resumed until it has ended by itself; its
state and metrics must then be, bit for bit, those of a run that was never killed. Two runs suffer
side by side, so that the machine is busy, and so that moments shift.
"""

import collections
import concurrent.futures
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.run import checkpoint
from tests.faults.damage import Broken, command, holds, small
from tests.faults.runs import CLI, Truth, words

# Some twenty checkpoints in some twenty seconds, and a replay of which most rows are replaced.
CONFIG = small(steps=4000, save_every=200, eval_episodes=1)
_LONGEST = 10.0  # seconds that a process lives from then on, at most
_SIDE_BY_SIDE = 2


def suffer(truth: Truth, run: Path, kills: int, seed: int) -> collections.Counter:
    """Kills a run so many times, or until it has ended; gives what happened, counted."""
    random, tally = np.random.default_rng(seed), collections.Counter()
    while True:
        life = float(random.uniform(0, _LONGEST)) if tally["kills"] < kills else None
        before, size = checkpoint.steps(run), _size(run)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*CLI, *words(truth.config, run)], stdout=pipe, stderr=subprocess.STDOUT, text=True
        ) as process:
            while life and tally["kills"] % 2 and process.poll() is None and _size(run) == size:
                time.sleep(0.02)
            try:
                out, _ = process.communicate(timeout=life)
            except subprocess.TimeoutExpired:
                saved = checkpoint.steps(run)  # all that is complete at this moment
                process.kill()
                out, _ = process.communicate()
                tally["kills"] += 1
                lost = saved and checkpoint.latest(run) < saved[-1]
                holds(not lost, f"the checkpoint of step {saved[-1:]} was lost")
                tally["while saving"] += any((run / "checkpoints").glob(".*.saving"))
                tally["before the first checkpoint"] += not saved
        begun = re.search(r"Going on from step ([\d,]+)", out)
        if begun:
            tally["resumed"] += 1
            at = int(begun[1].replace(",", ""))
            holds(at >= before[-1], f"went on from {at}, where {before[-1]} was saved")
        # The end would be the same, so comparing with the truth does not show it.
        anew = "begins again" in out and before
        holds(not anew, f"began again, where {before[-1:]} was saved: {out[-2000:]}")
        holds("is damaged" not in out, f"a checkpoint is damaged after a kill: {out[-2000:]}")
        if process.returncode == 0:
            truth.compare(run)
            tally["runs"] += 1
            return tally
        holds(process.returncode == -9, f"ended with {process.returncode}: {out[-2000:]}")


def _size(run: Path) -> int:
    """Bytes of the metrics so far."""
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many kills, over as many runs as it takes; gives the line of results."""
    truth = Truth(CONFIG, folder / "truth")
    tally, broken = collections.Counter(), []
    each = max(1, count // (6 * _SIDE_BY_SIDE))

    def side(number: int) -> None:
        mine = 0
        while mine < count // _SIDE_BY_SIDE:
            run = folder / f"run-{number}-{mine}"
            kills = min(each, count // _SIDE_BY_SIDE - mine)
            try:
                done = suffer(truth, run, kills, hash((seed, number, mine)) % 2**32)
            except (Broken, ValueError) as error:
                broken.append(f"{run.name}: {error}")
                print(broken[-1], flush=True)
                return
            mine += max(done["kills"], 1)
            tally.update(done)
            print(f"{time.strftime('%H:%M:%S')} {dict(tally)}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(_SIDE_BY_SIDE) as sides:
        list(sides.map(side, range(_SIDE_BY_SIDE)))
    counts = {name.replace(" ", "_"): number for name, number in tally.items()}
    return {"test": "kill", "count": count, **counts, "broken": broken}


if __name__ == "__main__":
    command(__doc__, 200, measure)
