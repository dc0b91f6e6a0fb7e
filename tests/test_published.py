"""The table of runs beside published returns, and the curves that it is made of."""

import json
import sys

import pytest

from benchmarks import published
from benchmarks.published import CURVES, RETURN, TASKS, Goal, around, evaluations, file_of, rows
from jaxwm.recipes import find

pytestmark = pytest.mark.no_cover

CURVE = [[10, 1.0], [20, 5.0], [30, 2.0]]


def write(path, values):
    """Evaluations {step: returns of seeds}, and a line of training between them."""
    lines = [{"step": 5, "seed": 0, "episode/return": 99.0, "episode/count": 1.0}]
    for step, returns in values.items():
        lines += [{"step": step, "seed": seed, RETURN: x} for seed, x in enumerate(returns)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_evaluations_are_sorted_by_step_and_seed(tmp_path):
    file = write(tmp_path / "a.jsonl", {30: [1.0, 2.0], 20: [3.0, 4.0]})
    assert evaluations(file) == {20: {0: 3.0, 1: 4.0}, 30: {0: 1.0, 1: 2.0}}


def test_a_published_return_has_its_neighbours():
    assert around(CURVE, 11) == (None, 1.0, 5.0)
    assert around(CURVE, 20) == (1.0, 5.0, 2.0)
    assert around(CURVE, 30) == (5.0, 2.0, None)


def test_verdict_on_a_curve(tmp_path):
    task = published.Task("ppo", "catch", (10, 20, 30), 1, "A")
    file = write(tmp_path / "a.jsonl", {10: [2.0, 3.0], 20: [4.0, 2.0], 30: [2.0, 4.0]})
    found = rows(task, file, {"A": CURVE})
    # 1 is below 2 to 3, 5 above 2 to 4, and 2 an end of 2 to 4.
    assert [row["verdict"] for row in found] == ["below", "above", "inside"]
    assert [found[1][name] for name in ("min", "mean", "max", "seeds")] == [2.0, 3.0, 4.0, 2]


def test_verdict_on_a_goal(tmp_path):
    goal = Goal(random=-10.0, best=0.0)
    assert goal.wanted == -2.0  # 80 % of the way
    task = published.Task("planet", "reach", (1, 2, 3), 1, goal)
    file = write(tmp_path / "a.jsonl", {1: [-3.0, -2.0], 2: [-3.0, -1.0], 3: [-2.0, -1.0]})
    assert [row["verdict"] for row in rows(task, file, {})] == ["no", "mean", "all"]


@pytest.mark.parametrize(("together", "seconds"), [(True, 5.0), (False, 9.0)])
def test_time_of_training(tmp_path, together, seconds):
    file = tmp_path / "a.jsonl"
    times = [(10, 0, 4.0), (10, 1, 5.0), (20, 0, 90.0), (20, 1, 91.0)]
    lines = [{"step": step, "seed": seed, "time": time} for step, seed, time in times]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    # Side by side the seeds share the time, one after the other they add it up.
    assert published.seconds(file, 10, together) == seconds


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_preset_and_its_budgets_are_published(name):
    task = TASKS[name]
    run = find(task.recipe).run(preset=task.preset)
    assert list(task.budgets) == sorted(task.budgets)
    assert task.budgets[-1] <= run.steps
    assert all(step % run.envs == 0 for step in task.budgets)
    if isinstance(task.against, str):
        steps = [step for step, _ in json.loads(CURVES.read_text("utf-8"))["curves"][task.against]]
        assert {step - run.envs for step in task.budgets} <= set(steps)
        # The last budget is the end of the published curve.
        assert task.budgets[-1] - run.envs == steps[-1]


@pytest.mark.parametrize("name", [name for name in TASKS if file_of(name).exists()])
def test_committed_curves_have_every_seed_at_their_budgets(name):
    found = evaluations(file_of(name))
    assert tuple(found) == TASKS[name].budgets[: len(found)]
    assert all(set(seeds) == set(range(published.SEEDS)) for seeds in found.values())


def test_the_page_of_benchmarks_has_the_table():
    page = (CURVES.parent / "README.md").read_text("utf-8")
    assert "\n".join(published.table()) in page


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["published"])
    published.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| task |")
    assert sum("ppo-cartpole" in line for line in lines) == 3
