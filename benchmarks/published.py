"""Test returns of `ppo` and `planet`, five seeds at several budgets, beside published ones.

    python -m benchmarks.published
    python -m benchmarks.published --train ppo-acrobot --runs runs

The first command prints a table of `results/learning/NAME-seeds0to4.jsonl`. The second trains the
seeds of one task as `jaxwm train` does, evaluates them at each budget, and writes that file: the
`metrics.jsonl` of the run with a line for each evaluation. It continues a run that was stopped.

`ppo` is held against `gymnax_blines.json`, test returns of one seed, whose points stand one step
of every environment before ours. `planet` is held against a share of the way from random actions to
the best known return.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.learning import FOLDER
from benchmarks.lines import in_words, parser_of

SEEDS = 5
CURVES = Path(__file__).parent / "gymnax_blines.json"
RETURN, EPISODES = "evaluation/return", "evaluation/episodes"


class Goal(NamedTuple):
    """What a mean return is held against where no curve was published.

    Attributes:
      random: return of uniformly random actions.
      best: best known return.
      share: how much of the way from one to the other is asked for.
    """

    random: float
    best: float
    share: float = 0.8

    @property
    def wanted(self) -> float:
        return self.random + self.share * (self.best - self.random)


class Task(NamedTuple):
    """A preset and what its returns are held against.

    Attributes:
      recipe: name of the recipe.
      preset: name of the preset.
      budgets: environment steps of the evaluations; the last one is the length of the run.
      episodes: test episodes of each seed at each budget.
      against: name of a curve in `gymnax_blines.json`, or a goal.
      together: whether the seeds train in one program, or one after the other.
    """

    recipe: str
    preset: str
    budgets: tuple[int, ...]
    episodes: int
    against: str | Goal
    together: bool = True


def _blines(preset: str, curve: str, budgets: tuple[int, ...], together: bool = True) -> Task:
    """A task of gymnax-blines, with as many test episodes as there."""
    return Task("ppo", preset, budgets, 164, curve, together)


TASKS = {
    "ppo-cartpole": _blines("gymnax_cartpole", "CartPole-v1", (40_000, 72_000, 144_000)),
    "ppo-acrobot": _blines("acrobot", "Acrobot-v1", (128_000, 256_000, 496_000)),
    "ppo-catch": _blines("catch", "Catch-bsuite", (24_000, 48_000, 96_000)),
    "ppo-mountaincar": _blines("mountaincar", "MountainCar-v0", (64_000, 128_000, 240_000)),
    "ppo-deepsea": _blines("deepsea", "DeepSea-bsuite", (40_000, 72_000, 144_000)),
    "ppo-breakout": _blines(
        "minatar",
        "Breakout-MinAtar",
        (2_560_000, 5_120_000, 6_720_000, 9_920_000),
        together=False,
    ),
    # The straight way to the target earns exactly -1.5 (`jaxwm.envs.toy.OPTIMUM`).
    "planet-reach": Task("planet", "reach", (832, 1_600, 3_200), 20, Goal(-8.3, -1.5)),
    # The best known return is that of gymnax-blines' evolution strategy after 39.6M steps
    # of the same environment; TD3 and SAC of rl-baselines3-zoo reach -152 and -157.
    "planet-pendulum": Task(
        "planet", "pendulum", (2_600, 5_000, 10_000), 20, Goal(-1227.0, -130.2)
    ),
}


def file_of(name: str, folder: Path = FOLDER) -> Path:
    """The file of a task's curves."""
    return folder / f"{name}-seeds0to{SEEDS - 1}.jsonl"


def evaluations(file: Path) -> dict[int, dict[int, float]]:
    """The mean return of each seed's test episodes, by step and seed."""
    found: dict[int, dict[int, float]] = {}
    for line in map(json.loads, file.read_text("utf-8").splitlines()):
        if RETURN in line:
            found.setdefault(line["step"], {})[line["seed"]] = line[RETURN]
    return dict(sorted(found.items()))


def around(curve: list[list[float]], step: int) -> tuple[float | None, float, float | None]:
    """The published return at a step, between those of the points before and after it.

    Args:
      curve: steps and returns.
      step: the last point up to it counts.
    """
    index = max(i for i, point in enumerate(curve) if point[0] <= step)
    values = [None, *(point[1] for point in curve), None]
    return values[index], curve[index][1], values[index + 2]


def rows(task: Task, file: Path, curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row per budget: our returns, what they are held against, and whether they pass."""
    found = []
    for step, seeds in evaluations(file).items():
        ours = [seeds[seed] for seed in sorted(seeds)]
        low, mean, high = min(ours), math.fsum(ours) / len(ours), max(ours)
        row = {"step": step, "min": low, "mean": mean, "max": high, "seeds": len(ours)}
        if isinstance(task.against, Goal):
            wanted = task.against.wanted
            reached = "all" if low >= wanted else "mean" if mean >= wanted else "no"
            row |= {"against": f"{_short(wanted)} wanted", "verdict": reached}
        else:
            before, value, after = around(curves[task.against], step)
            beside = ", ".join("-" if x is None else _short(x) for x in (before, after))
            where = "below" if value < low else "above" if value > high else "inside"
            row |= {"against": f"{_short(value)} ({beside})", "verdict": where}
        found.append(row)
    return found


def seconds(file: Path, step: int, together: bool) -> float:
    """How long the training of all seeds took up to a step, without compilation."""
    latest: dict[int, float] = {}
    for line in map(json.loads, file.read_text("utf-8").splitlines()):
        if "time" in line and line["step"] <= step:
            latest[line["seed"]] = max(line["time"], latest.get(line["seed"], 0.0))
    return max(latest.values()) if together else math.fsum(latest.values())


def table(folder: Path = FOLDER) -> list[str]:
    """The lines of a table in Markdown, with all tasks whose curves are in a folder."""
    curves = json.loads(CURVES.read_text("utf-8"))["curves"]
    lines = [
        "| task | preset | steps | ours: min, mean, max | published, or wanted | verdict | time |",
        "|---|---|--:|---|---|---|--:|",
    ]
    for name, task in TASKS.items():
        file = file_of(name, folder)
        for row in rows(task, file, curves) if file.exists() else []:
            step, time = row["step"], seconds(file, row["step"], task.together)
            ours = ", ".join(_short(row[key]) for key in ("min", "mean", "max"))
            lines.append(
                f"| `{name}` | `{task.preset}` | {step:,} | {ours} | {row['against']} "
                f"| {row['verdict']} | {time:,.0f} s |"
            )
    return lines


def _short(value: float) -> str:
    """Four significant digits, or two decimals."""
    return f"{value:.4g}" if abs(value) >= 1 else f"{value + 0.0:.2f}"


def train(name: str, runs: Path) -> None:
    """Trains and evaluates the seeds of a task in folders under `runs`, and writes its file."""
    from jaxwm.recipes import find

    task = TASKS[name]
    config = find(task.recipe).run(preset=task.preset)
    if isinstance(task.against, str):
        # A run ends with a line of metrics, so let a line end at every published point.
        (first, _), (second, _), *_ = json.loads(CURVES.read_text("utf-8"))["curves"][task.against]
        config = dataclasses.replace(config, log_every=(second - first) // 2)
    count = SEEDS if task.together else 1
    config = dataclasses.replace(config, seeds=count, eval_episodes=task.episodes)
    for budget in task.budgets:
        lines = []
        for seed in range(0, SEEDS, count):
            own = dataclasses.replace(config, seed=seed, steps=budget)
            lines += _train(own, runs / f"{name}-seed{seed}")
        lines.sort(key=lambda line: (line["step"], line["seed"], RETURN in line))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file_of(name).write_text(text, "utf-8")


def _train(config: Any, folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of one run, and those of its evaluations until now."""
    from jaxwm.run.log import read_metrics
    from jaxwm.run.loop import run

    kept = folder / "evaluations.json"
    done = json.loads(kept.read_text("utf-8")) if kept.exists() else []
    if max([line["step"] for line in done], default=0) < config.steps:
        summary = run(config, folder, resume=(folder / "config.json").exists())
        for index, returns in enumerate(summary.returns):
            values = {RETURN: round(float(returns.mean()), 4), EPISODES: len(returns)}
            done.append({"step": summary.steps, "seed": index, **values})
        kept.write_text(json.dumps(done), "utf-8")
    lines = [*read_metrics(folder), *done]
    return [line | {"seed": line["seed"] + config.seed} for line in lines]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train", choices=TASKS, help="train the seeds of this task first")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where its runs go")
    args = parser.parse_args()
    if args.train:
        train(args.train, args.runs)
    lines = table()
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    in_words(main)
