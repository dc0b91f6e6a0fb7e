"""Runs beside the published curves: the data, which curve is whose, scores, verdicts, pictures."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jaxwm import cli, config
from jaxwm.evaluate import published
from jaxwm.evaluate.compare import compare
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.run.checkpoint import read_config
from jaxwm.run.log import Logger
from jaxwm.types import JaxwmError
from jaxwm.view import plot

SWINGUP = "playground/CartpoleSwingup"
TASK = "dmc_proprio/cartpole_swingup"


def run_of(env, **changes) -> RunConfig:
    return RunConfig(env, "dreamer_v3", "size1m", "head", agent=dreamer_v3.Config(), **changes)


def run_folder(folder, returns, env=SWINGUP, seed=0, steps=250_000, repeat=2, every=5_000, **other):
    """A run whose seeds end one episode of `returns[seed]` at every write."""
    other |= {"seed": seed, "seeds": len(returns), "steps": steps, "action_repeat": repeat}
    settings = run_of(env, **other)
    with Logger(folder, steps, len(returns), console=Console(quiet=True)) as logger:
        for step in range(every, steps + 1, every):
            metrics = {"episode/return": np.array(returns, float), "episode/count": 1.0}
            logger.write(step, step, metrics)
    config.write(settings, folder / "config.json")
    return folder


# The data


def test_every_curve_is_whole():
    known = published.tasks()
    assert len(known) == len(set(known)) == 26 + 57 + 18 + 20 + 30 + 1 + 16
    for task in known:
        curve = published.curve(task)
        assert curve.mean.shape == curve.std.shape == curve.seeds.shape == (published.POINTS,)
        assert np.isfinite(curve.mean).all() and (curve.std >= 0).all() and (curve.seeds > 0).all()
        assert curve.frames[-1] == published.BUDGETS[task.partition("/")[0]]


def test_the_data_names_source_and_licence():
    text = published.DATA.read_text()
    assert "github.com/danijar/dreamerv3" in published.source()
    assert "MIT. Copyright (c) 2024 Danijar Hafner Permission is hereby granted" in text
    assert len(text) < 200_000


def test_published_numbers_of_one_task():
    # Five runs of 500,000 frames; their last 25,000 gave 853 on average.
    curve = published.curve(TASK)
    assert (curve.width, curve.frames[0], curve.seeds[0]) == (25_000, 25_000, 5)
    assert (curve.mean[-1], curve.std[-1]) == (853.3, 13.1)
    assert published.curve("quadruped_run").task == "dmc_vision/quadruped_run"
    assert published.curve("atari57/pong", "muzero").seeds.tolist() == [1] * 20


def test_bins_end_at_their_frames():
    # Bins of 10: frames 1..10, 11..20, 21..30; 0 belongs to the first; NaN does not count.
    values = published.binned([0, 10, 11, 12, 30], [1, 3, 5, np.nan, 7], 10)
    np.testing.assert_allclose(values, [2, 5, 7])
    # Weighted: (1 * 4 + 3 * 8) / 4 = 7, and nothing in the second bin.
    values = published.binned([1, 2, 25], [4, 8, 1], 10, [1, 3, 2])
    np.testing.assert_allclose(values, [7, np.nan, 1])


def test_score_files_are_condensed(tmp_path):
    # A twentieth of 400,000 is 20,000. Run 0 has 1 and 3 in the first, 10 in the second, and
    # stops; run 1 has 4 in the first and 6 in the last: means 3 = (2 + 4) / 2, 10 and 6.
    (tmp_path / "LICENSE").write_text("Take\n\nit.\n")
    scores = tmp_path / "scores"
    scores.mkdir()
    runs = [
        {"task": "atari_pong", "method": "mine", "xs": [1, 20_000, 20_001], "ys": [1, 3, 10]},
        {"task": "atari_pong", "method": "mine", "xs": [9, 400_000, 400_001], "ys": [4, 6, 99]},
    ]
    packed = gzip.compress(json.dumps(runs).encode())
    (scores / "atari100k-mine.json.gz").write_bytes(packed)
    data = published.condense(scores)
    entry = data["curves"]["atari100k"]["pong"]["mine"]
    nothing = [None] * 17
    assert entry["mean"] == [3, 10, *nothing, 6]
    assert entry["std"] == [1, 0, *nothing, 0]
    assert entry["seeds"] == [2, 1, *[0] * 17, 1]
    assert data["licence"] == "MIT. Take it."
    assert set(data) == set(json.loads(published.DATA.read_text()))
    with pytest.raises(JaxwmError, match="There are no score files"):
        published.condense(tmp_path)


# Which curve is whose


@pytest.mark.parametrize(
    ("env", "steps", "task"),
    [
        ("playground/CartpoleSwingup", 1_000, TASK),
        ("playground/BallInCup", 1_000, "dmc_proprio/ball_in_cup_catch"),
        ("dm_control/cartpole-swingup", 1_000, TASK),
        ("dm_control/finger-turn_hard", 1_000, "dmc_proprio/finger_turn_hard"),
        ("dm_control/quadruped-run:image", 1_000, "dmc_vision/quadruped_run"),
        ("atari/MsPacman", 100_000, "atari100k/ms_pacman"),
        ("atari/MsPacman", 110_000, "atari100k/ms_pacman"),
        ("atari/Pong:100k", 10_000_000, "atari100k/pong"),
        ("atari/up_n_down", 50_000_000, "atari57/up_n_down"),
        ("atari/Zaxxon", 1_000, "atari57/zaxxon"),
        ("gymnasium/ALE/Pong-v5", 100_000, "atari100k/pong"),
    ],
)
def test_environments_find_their_task(env, steps, task):
    assert published.task_of(run_of(env, steps=steps)) == task


@pytest.mark.parametrize(
    ("env", "steps"),
    [
        ("playground/HumanoidRun", 1_000),
        ("dm_control/quadruped-run", 1_000),
        ("dm_control/cartpole-swingup:noisy", 1_000),
        ("craftax/Craftax-Classic-Pixels-v1", 1_000_000),
        ("gymnax/Breakout-MinAtar", 100_000),
        ("gymnasium/Pong-v4", 100_000),
        ("toy/Memory", 1_000),
    ],
)
def test_other_environments_find_none(env, steps):
    with pytest.raises(JaxwmError, match=f"No published curve is known to be that of {env}"):
        published.task_of(run_of(env, steps=steps))


def test_a_doubt_is_told():
    with pytest.raises(JaxwmError, match=r"k/pong and as atari57/pong, .* 4,000,000 frames"):
        published.task_of(run_of("atari/Pong", steps=1_000_000))
    with pytest.raises(JaxwmError, match="Several suites have pong: atari100k/pong and atari57/po"):
        published.curve("pong")
    with pytest.raises(JaxwmError, match=r"Did you mean .*dmc_proprio/cartpole_swingup"):
        published.curve("dmc_proprio/cartpole_swing")
    with pytest.raises(JaxwmError, match=r"no published method of .* Did you mean dreamerv3"):
        published.curve(TASK, "dreamer_v3")


def test_frames_count_repeats_and_those_inside():
    def frames(env, repeat):
        return published.frames_per_step(run_of(env, action_repeat=repeat))

    assert frames(SWINGUP, 1) == 1 and frames(SWINGUP, 2) == 2
    assert frames("atari/Pong", 1) == frames("gymnasium/ALE/Pong-v5", 1) == 4
    assert frames("envpool/UpNDown-v5", 1) == 4 and frames("envpool/CartPole-v1", 1) == 1


def test_mjx_is_never_called_dmc():
    assert published.label(run_of(SWINGUP)) == "DMC (MJX)"
    assert published.label(run_of("dm_control/cartpole-swingup")) == "DMC"
    assert published.label(run_of("atari/Pong")) == "atari/Pong"


# Scores and verdicts


def test_inside(tmp_path):
    # Published at the end: 853.3 with a deviation of 13.1, so 840.2 to 866.4.
    run = run_folder(tmp_path / "a", [850, 845, 870])
    result = compare([run])
    verdict = result.verdict
    assert verdict.frames == 500_000 and verdict.inside is True
    np.testing.assert_allclose(verdict.scores, [850, 845, 870])
    # Of three values: the mean is the lowest (or highest) only with probability 1/27 > 0.025.
    assert verdict.interval == (845.0, 870.0)
    np.testing.assert_allclose([verdict.low, verdict.high], [840.2, 866.4])
    assert "At 500,000 frames the mean return of 3 seeds is 855 (95% interval 845 to 870);" in (
        verdict.words
    )
    assert "dreamerv3 on dmc_proprio/cartpole_swingup is published with 853 (840 to 866, one" in (
        verdict.words
    )
    assert verdict.words.endswith("The runs are inside the published band.")
    assert any("DMC (MJX), not DMC" in words for words in result.caveats)
    assert any("first version" in words for words in result.caveats)


@pytest.mark.parametrize(("value", "where"), [(500, "below"), (950, "above")])
def test_outside(tmp_path, value, where):
    verdict = compare([run_folder(tmp_path / "a", [value, value + 9, value - 9])]).verdict
    assert verdict.inside is False
    assert verdict.words.endswith(f"The runs are outside the published band, {where} it.")


def test_these_seeds_cannot_tell(tmp_path):
    # The mean, 900, is above 866.4, and the interval (840 to 960) reaches below it.
    verdict = compare([run_folder(tmp_path / "a", [840, 960])]).verdict
    assert verdict.inside is None and verdict.interval == (840.0, 960.0)
    assert "The mean is above the published band and its interval reaches into it" in verdict.words


def test_one_seed_is_no_verdict(tmp_path):
    verdict = compare([run_folder(tmp_path / "a", [850])]).verdict
    assert verdict.inside is None and verdict.interval is None
    assert "At 500,000 frames the return of the only seed is 850" in verdict.words
    assert verdict.words.endswith(
        "This value is inside the band, but one seed has no interval, so it is no verdict."
    )


def test_one_published_run_is_no_band(tmp_path):
    run = run_folder(tmp_path / "a", [8, 9], "mine/Bigfish", steps=50_000_000, every=2_000_000)
    verdict = compare([run], "procgen/bigfish").verdict
    assert verdict.inside is None and verdict.interval is not None
    assert "from a single run. That is no band" in verdict.words


def test_the_score_is_the_mean_of_the_episodes_in_the_last_bin(tmp_path):
    # Repeat 2 makes bins of 12,500 steps. In the one that ends at step 25,000 two writes: 3
    # episodes of 100 on average and 1 of 300, (3 * 100 + 300) / 4 = 150; the write at 12,500
    # belongs to the bin before, the one at 26,000 to a bin that the run has not finished.
    folder = tmp_path / "a"
    with Logger(folder, 30_000, console=Console(quiet=True)) as logger:
        for step, value, count in (
            (12_500, 9, 5),
            (12_501, 100, 3),
            (20_000, np.nan, 0),
            (25_000, 300, 1),
            (26_000, 999, 7),
        ):
            logger.write(step, 0, {"episode/return": value, "episode/count": count})
    config.write(run_of(SWINGUP, action_repeat=2), folder / "config.json")
    result = compare([folder])
    assert result.verdict.frames == 50_000
    np.testing.assert_allclose(result.verdict.scores, [150])
    np.testing.assert_allclose(result.returns, [[9, 150, 999]])
    np.testing.assert_array_equal(result.frames, [[25_000, 50_000, 52_000]])


def test_runs_are_compared_where_all_have_been(tmp_path):
    long = run_folder(tmp_path / "long", [800, 810])
    short = run_folder(tmp_path / "short", [820], seed=2, steps=60_000, log_every=7)
    result = compare([long, short])
    # 60,000 steps are 120,000 frames: the last whole bin of 25,000 ends at 100,000.
    assert result.verdict.frames == 100_000
    np.testing.assert_allclose(result.verdict.scores, [800, 810, 820])
    assert result.seeds == (f"{long} seed 0", f"{long} seed 1", f"{short} seed 2")
    assert np.isnan(result.returns[2, 5:]).all()


def test_long_runs_are_compared_at_the_end_of_the_published_curve(tmp_path):
    run = run_folder(tmp_path / "a", [850, 851], steps=500_000)
    assert compare([run]).verdict.frames == 500_000


def test_too_short_a_run_is_told(tmp_path):
    result = compare([run_folder(tmp_path / "a", [10, 20], steps=10_000)])
    verdict = result.verdict
    assert verdict.frames is None and verdict.inside is None and np.isnan(verdict.scores).all()
    assert "the first of which is at 25,000 frames" in verdict.words
    assert "The shortest seed has reached 20,000." in verdict.words
    own = result.to_dict()["own"]
    assert own["mean"] is own["iqm"] is own["interval"] is None
    assert plot.comparison(result, tmp_path / "short.png").exists()


def test_what_cannot_be_compared_is_told(tmp_path):
    one = run_folder(tmp_path / "one", [1, 2])
    with pytest.raises(JaxwmError, match="give at least one run folder"):
        compare([])
    with pytest.raises(JaxwmError, match="There is no run folder"):
        compare([tmp_path / "nowhere"])
    other = run_folder(tmp_path / "other", [1], "playground/CheetahRun")
    with pytest.raises(JaxwmError, match=r"one environment: .*CartpoleSwingup and .*CheetahRun"):
        compare([one, other])
    repeated = run_folder(tmp_path / "repeated", [1], seed=2, repeat=1)
    with pytest.raises(JaxwmError, match=r"cannot be pooled.* action_repeat: 2 here, 1 there"):
        compare([one, repeated])
    again = run_folder(tmp_path / "again", [1], seed=1)
    with pytest.raises(JaxwmError, match=r"one seed 1 and .*again seed 1 are the same seed"):
        compare([one, again])
    quiet = run_folder(tmp_path / "quiet", [np.nan], seed=5)
    with pytest.raises(JaxwmError, match=r"No episode of .* seed 5 has ended yet"):
        compare([quiet])
    swept = dataclasses.replace(read_config(other), sweep=("entropy=0.1,0.2",))
    config.write(swept, other / "config.json")
    with pytest.raises(JaxwmError, match=r"other is a sweep .*Compare runs of one setting each"):
        compare([other])


# The picture and the command


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_picture_shows_both(tmp_path):
    result = compare([run_folder(tmp_path / "a", [850, 400, 600])])
    picture = pixels(plot.comparison(result, tmp_path / "pictures" / "compare.png"))
    assert picture.shape == (420, 720, 3)
    for color in ((0, 114, 178), (127, 127, 127)):
        assert (picture == np.array(color, np.uint8)[None, None]).all(-1).any()
    with pytest.raises(JaxwmError, match=r"should end in \.png"):
        plot.comparison(result, tmp_path / "compare.docx")


def test_the_command(tmp_path, capsys):
    run = run_folder(tmp_path / "a", [850, 845, 870])
    picture, numbers = tmp_path / "compare.png", tmp_path / "new" / "compare.json"
    assert cli.main(["compare", str(run), "--out", str(picture), "--json", str(numbers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("At 500,000 frames") and lines[-1] == str(picture)
    assert any("the simulator differs" in line for line in lines)
    told = json.loads(numbers.read_text())
    assert (told["task"], told["method"], told["label"]) == (TASK, "dreamerv3", "DMC (MJX)")
    assert told["frames"] == 500_000 and told["inside"] is True and told["words"] == lines[0]
    assert told["own"]["mean"] == 855.0 and told["own"]["interval"] == [845.0, 870.0]
    assert told["own"]["iqm"] == 855.0 and told["own"]["seeds"][f"{run} seed 2"] == 870.0
    assert told["published"]["mean"] == 853.3 and told["published"]["seeds"] == 5
    assert "danijar/dreamerv3" in told["published"]["source"]


def test_the_command_takes_task_and_method(tmp_path, capsys):
    run = run_folder(tmp_path / "a", [150, 200], "mine/Pole")
    flags = ["--out", str(tmp_path / "compare.svg")]
    words = ["compare", str(run), "--task", TASK, "--method", "ppo_fixhp", *flags]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "ppo_fixhp on dmc_proprio/cartpole_swingup is published" in told
    assert f"That mine/Pole is {TASK} was said with --task" in told
    assert cli.main(["compare", str(run), *flags]) == 2
    assert "name it with --task" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["compare"]) == 2
    assert "RUN" in capsys.readouterr().err
