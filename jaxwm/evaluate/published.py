"""The learning curves that were published with DreamerV3, of it and of what it was compared to.

`data/dreamerv3.json` holds them with their source and licence. A task is named SUITE/TASK, such
as "dmc_proprio/cartpole_swingup". A curve has 20 points, each the mean over seeds of the episode
returns of one twentieth of the suite's budget, which it stands at the end of. Frames are those
of the simulator: an action that is repeated twice takes two. Returns are those of training
episodes, with actions drawn from the policy.

To make the file again from the authors' score files, a folder of TASKSUITE-METHOD.json.gz:

    python -m jaxwm.evaluate.published path/to/dreamerv3/scores
"""

import dataclasses
import functools
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.recipes import RunConfig
from jaxwm.types import JaxwmError, nearest

DATA = Path(__file__).parent / "data" / "dreamerv3.json"
METHOD = "dreamerv3"
POINTS = 20
BUDGETS = {
    "atari100k": 400_000,
    "atari57": 200_000_000,
    "dmc_proprio": 500_000,
    "dmc_vision": 1_000_000,
    "dmlab30": 100_000_000,
    "minecraft": 100_000_000,
    "procgen": 50_000_000,
}
# What must be said along with some curves, by SUITE/METHOD.
CAVEATS = {
    "dmc_proprio/dreamerv3": "The published curves of dreamerv3 on dmc_proprio are older than the "
    "others: they were made with the code of the paper's first version. Their points are 10,000 "
    "frames apart, and whether each stands at the beginning or the end of its 10,000 is not told.",
}
MJX = (
    "The run is DMC (MJX), not DMC: the tasks are those of the DeepMind Control Suite, the "
    "simulator differs from that of the published runs."
)
_IMAGES = ("image", "pixels")


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A published learning curve, of P points.

    Args:
      task: SUITE/TASK.
      method: name of the method.
      width: frames from one point to the next.
      mean: mean over seeds (P,), NaN where nothing was published.
      std: standard deviation over seeds (P,), dividing by their number.
      seeds: seeds that each point is a mean of (P,); some runs ended early.
      caveats: sentences to be told with the curve.
    """

    task: str
    method: str
    width: int
    mean: np.ndarray
    std: np.ndarray
    seeds: np.ndarray
    caveats: tuple[str, ...] = ()

    @property
    def frames(self) -> np.ndarray:
        """Frames (P,) at which the points stand: the ends of what they are means over."""
        return self.width * np.arange(1, len(self.mean) + 1)


def tasks() -> list[str]:
    """Every published task, as SUITE/TASK."""
    return [f"{suite}/{task}" for suite, entries in _data()["curves"].items() for task in entries]


def source() -> str:
    """Where the curves are from."""
    return _data()["source"]


def curve(task: str, method: str = METHOD) -> Curve:
    """The published curve of a method on a task.

    Args:
      task: SUITE/TASK, or TASK alone where only one suite has it.
      method: name of the method.

    Raises:
      JaxwmError: if there is no such task or method, or several suites have the task.
    """
    known = tasks()
    found = [task] if task in known else [x for x in known if x.partition("/")[2] == task]
    if not found:
        raise nearest(task, known, "published task")
    if len(found) > 1:
        raise JaxwmError(f"Several suites have {task}: {' and '.join(found)}. Name one of these.")
    suite, _, name = found[0].partition("/")
    entries = _data()["curves"][suite][name]
    if method not in entries:
        raise nearest(method, entries, f"published method of {found[0]}")
    entry = entries[method]
    mean, std = (np.array(entry[key], float) for key in ("mean", "std"))
    caveat = CAVEATS.get(f"{suite}/{method}")
    return Curve(
        task=found[0],
        method=method,
        width=BUDGETS[suite] // POINTS,
        mean=mean,
        std=std,
        seeds=np.broadcast_to(entry["seeds"], mean.shape),
        caveats=(caveat,) if caveat else (),
    )


def task_of(config: RunConfig) -> str:
    """The published task of a run's environment, where there is no doubt about it.

    `dm_control` and `playground` are `dmc_proprio`, or `dmc_vision` if images are asked for
    (`:image` or `:pixels` after the name). Atari was published with two budgets: without ":100k"
    it is the one of which the run is to reach a point and not to exceed the end by more than a
    quarter.

    Args:
      config: the run.

    Returns:
      SUITE/TASK.

    Raises:
      JaxwmError: if no published task is known to be that of the environment, or two may be.
    """
    suite, _, name = config.env.partition("/")
    name, _, option = name.partition(":")
    homes: tuple[str, ...] = ()
    if suite == "atari" and option == "100k":
        homes = ("atari100k",)
    elif _is_atari(config.env) and not option:
        homes, name = ("atari100k", "atari57"), re.sub(r"^ALE/|-v\d+$", "", name)
    elif suite in ("dm_control", "playground") and option in ("", *_IMAGES):
        homes = ("dmc_vision",) if option else ("dmc_proprio",)
        name = "BallInCupCatch" if (suite, name) == ("playground", "BallInCup") else name
    known = tasks()
    same = [x for x in known if x.partition("/")[0] in homes and _plain(x) == _plain(f"/{name}")]
    planned = config.steps * frames_per_step(config)
    if len(same) > 1:
        budget = {x: BUDGETS[x.partition("/")[0]] for x in same}
        fits = [x for x in same if budget[x] / POINTS <= planned <= 1.25 * budget[x]]
        same = fits if len(fits) == 1 else same
    if len(same) == 1:
        return same[0]
    if same:
        raise JaxwmError(
            f"{config.env} was published as {' and as '.join(same)}, and a run of {planned:,} "
            "frames is neither for certain. Say which is meant with --task."
        )
    raise JaxwmError(
        f"No published curve is known to be that of {config.env}. If one is, name it with --task; "
        f"there are tasks of {', '.join(BUDGETS)}, such as {known[0]}."
    )


def frames_per_step(config: RunConfig) -> int:
    """Frames of the simulator for each of a run's environment steps.

    An Atari environment plays each action for four frames by itself; the run's own repeats of
    actions come on top.
    """
    return config.action_repeat * (4 if _is_atari(config.env) else 1)


def caveats(config: RunConfig) -> tuple[str, ...]:
    """Sentences to be told when a run's environment is compared with published ones."""
    return (MJX,) if config.env.startswith("playground/") else ()


def label(config: RunConfig) -> str:
    """What results in a run's environment are called: MJX's are never called DMC."""
    suite = config.env.partition("/")[0]
    return {"playground": "DMC (MJX)", "dm_control": "DMC"}.get(suite, config.env)


def condense(scores: Path) -> dict[str, Any]:
    """What `data/dreamerv3.json` holds, from the authors' score files.

    Points of a run are averaged over each twentieth of the suite's budget, its end included and
    its beginning not; then follow mean and standard deviation over the runs that have any there.
    Means are rounded to four digits and deviations to three.

    Args:
      scores: folder of the files, beside the licence.

    Returns:
      Source, rule, licence and `curves`: {suite: {task: {method: {mean, std, seeds}}}}.

    Raises:
      JaxwmError: if there are no such files.
    """
    files = sorted(scores.glob("*.json.gz"))
    if not files:
        raise JaxwmError(f"There are no score files, such as atari57-muzero.json.gz, in {scores}.")
    runs: dict[str, dict[str, dict[str, list]]] = {}
    for file in files:
        # A task's name begins with that of its family, which is the first word of its suite's.
        suite = file.name.partition("-")[0].removesuffix("_diamond")
        for run in json.loads(gzip.decompress(file.read_bytes())):
            task = run["task"].partition("_")[2]
            row = binned(run["xs"], run["ys"], BUDGETS[suite] // POINTS)[:POINTS]
            row = np.pad(row, (0, POINTS - len(row)), constant_values=np.nan)
            methods = runs.setdefault(suite, {}).setdefault(task, {})
            methods.setdefault(run["method"], []).append(row)
    curves = {
        suite: {
            task: {method: _summary(np.array(rows)) for method, rows in methods.items()}
            for task, methods in entries.items()
        }
        for suite, entries in runs.items()
    }
    return {
        "source": "https://github.com/danijar/dreamerv3, folder scores, commit e3f0224 "
        "(Hafner et al., arXiv:2301.04104)",
        "rule": " ".join(str(condense.__doc__).split("\n\n")[1].split()),
        "licence": f"MIT. {' '.join((scores.parent / 'LICENSE').read_text().split())}",
        "curves": curves,
    }


def binned(frames: Any, values: Any, width: int, weights: Any = None) -> np.ndarray:
    """Means over bins of `width` frames: bin i holds frames i * width + 1 to (i + 1) * width.

    Args:
      frames: whole numbers (M,); 0 counts as 1.
      values: numbers (M,); NaN is left out.
      width: frames of a bin.
      weights: weights (M,) of the values; None is 1 for each.

    Returns:
      Means of all bins up to the last value's, NaN where a bin is empty.
    """
    frames, values = np.asarray(frames, np.int64), np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    kept = np.isfinite(values)
    index = np.maximum(frames[kept] - 1, 0) // width
    total = np.bincount(index, weights[kept] * values[kept])
    weight = np.bincount(index, weights[kept])
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def _summary(rows: np.ndarray) -> dict[str, Any]:
    """Mean, deviation and number of the runs (rows) that have a value, for each point."""
    seeds = np.isfinite(rows).sum(0)
    mean, std = np.full(POINTS, np.nan), np.full(POINTS, np.nan)
    used = seeds > 0
    mean[used], std[used] = np.nanmean(rows[:, used], 0), np.nanstd(rows[:, used], 0)
    counts = [int(n) for n in seeds]
    return {
        "mean": _rounded(mean, 4),
        "std": _rounded(std, 3),
        "seeds": counts[0] if len(set(counts)) == 1 else counts,
    }


def _rounded(values: np.ndarray, digits: int) -> list[float | int | None]:
    numbers = [None if np.isnan(x) else float(f"{x:.{digits}g}") for x in values]
    return [int(x) if x is not None and x == int(x) else x for x in numbers]


def _is_atari(env: str) -> bool:
    """Whether each step of an environment is four frames of an Atari game."""
    if env.startswith("envpool/"):  # which has other suites too, and names no suite
        games = {_plain(task) for task in tasks() if task.startswith("atari")}
        return _plain(re.sub(r"-v\d+$", "", env)) in games
    return env.startswith(("atari/", "gymnasium/ALE/"))


def _plain(name: str) -> str:
    """What is behind the slash, in small letters and digits only."""
    return re.sub(r"[\W_]", "", name.partition("/")[2].lower())


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text("utf-8"))


if __name__ == "__main__":
    text = json.dumps(condense(Path(sys.argv[1])), separators=(",", ":"))
    DATA.write_text(text.replace('}},"', '}},\n"') + "\n", "utf-8")  # a line for each task
