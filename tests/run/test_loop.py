"""What a run leaves behind, and what stops it."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwm
from jaxwm import cli, envs, train
from jaxwm import config as configs
from jaxwm.evaluate import final
from jaxwm.run import checkpoint
from jaxwm.run.log import read_metrics
from jaxwm.run.loop import default_folder, resume, run
from jaxwm.run.report import command
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition


def test_a_finished_run_leaves_its_papers(tiny, finished):
    assert {x.name for x in finished.iterdir()} == {
        *("config.json", "versions.json", "metrics.jsonl", "checkpoints", "lock"),
        *("SUMMARY.md", "curve.png", "dream.png"),
    }
    assert checkpoint.read_config(finished) == tiny
    # save_every = 100 is passed by the chunk of 40 steps that ends at 120.
    assert checkpoint.steps(finished) == [120, 200]
    found = json.loads((finished / "versions.json").read_text())
    assert found["jax"] == jax.__version__ and {"python", "flax", "optax", "device"} <= set(found)
    text = (finished / "SUMMARY.md").read_text()
    words = ["toy/Memory", "--env toy/Memory --size debug", "evaluation return: ", "dream.png"]
    words += ["time of training", "time of compiling", "| environment steps per seed | 200 |"]
    words += ["| time to the first update | "]
    words += [f"jaxwm resume {finished}", f"jaxwm eval {finished}", "jaxwm.load"]
    for word in words:
        assert word in text


def test_every_chunk_is_told(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [40, 80, 120, 160, 200]
    # 10 rows of each environment make a chunk; the replay holds all of them.
    assert [line["replay/size"] for line in lines] == [40, 80, 120, 160, 200]
    # Training starts once a batch of 2 x 6 rows is there, 9 rows of 4 environments; from then
    # on 2 rows are trained on for each of 4 x (50 - 8) steps, 12 in an update.
    assert lines[-1]["updates"] == 2 * 4 * 42 // 12
    assert "loss/total" in lines[-1]


@pytest.mark.parametrize(
    ("ratio", "steps", "told"),
    [
        (2.0, 36, "Nothing was learned: the first update comes with step 40. Raise --steps."),
        (2.0, 40, "Trained."),
        (0.0, 40, "Collected, without any update, as train_ratio is 0."),
    ],
)
def test_a_run_without_an_update_says_why(tiny, tmp_path, capsys, ratio, steps, told):
    replay = dataclasses.replace(tiny.replay, train_ratio=ratio)
    summary = run(
        dataclasses.replace(tiny, steps=steps, log_every=4, replay=replay), tmp_path / "run"
    )
    assert f"{told} Evaluating" in capsys.readouterr().out
    assert summary.updates == (told == "Trained.")


@pytest.mark.no_cover
def test_seeds_side_by_side_are_told_apart(tiny, tmp_path, capsys):
    config = dataclasses.replace(tiny, seeds=2, seed=5, steps=80, log_every=80)
    with jax.debug_key_reuse(False):
        summary = run(config, tmp_path / "run")
        resumed = resume(tmp_path / "run", steps=160, quiet=True)
    assert resumed.steps == 160
    assert summary.returns.shape == (2, 3)
    told = capsys.readouterr().out
    means = summary.returns.mean(1)
    assert f"evaluation return (seed 5): {means[0]:.6g}\n" in told
    assert f"evaluation return (seed 6): {means[1]:.6g}\n" in told
    assert f"\nevaluation return: {summary.returns.mean():.6g}\n" in told
    assert {line["seed"] for line in read_metrics(tmp_path / "run")} == {0, 1}
    one, two = (jaxwm.load(tmp_path / "run", member=i) for i in range(2))
    cue = np.ones(8, int)
    assert (one.act(cue)[1].carry.model.stoch != two.act(cue)[1].carry.model.stoch).any()


def test_the_default_folder_is_named_after_the_run(tiny):
    config = dataclasses.replace(tiny, env="gymnax/CartPole-v1", seed=3)
    assert str(default_folder(config)) == "runs/dreamer_v3-gymnax-cartpole-v1-debug-seed3"


def breaking(at: int) -> Env:
    """One endless episode, whose observation "height" is NaN at step `at`."""

    def reset(key):
        return jnp.zeros((), jnp.int32), first(Discrete(2), {"height": jnp.zeros((1,))})

    def step(state, action, key):
        height = jnp.where(state + 1 == at, jnp.nan, 1.0)
        return state + 1, transition(action, {"height": height[None]}, 0.0, False)

    return Env("test/Breaking", {"height": Box((1,))}, Discrete(2), reset, step)


def test_a_broken_environment_stops_the_run(tiny, tmp_path, monkeypatch, capsys):
    """The row is named, and the checkpoint before it stays the last."""
    # Step 35 of 4 environments falls into the chunk from 120 to 160; a checkpoint is at 120.
    monkeypatch.setattr(envs, "make", lambda name: breaking(35))
    folder = tmp_path / "run"
    assert cli.main([*command(tiny).split()[1:], "--run", str(folder)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "stopped before step 160" in told and "Earlier checkpoints are kept" in told
    assert "NaN or an infinity: first in the observation 'height' of environment 0, 4 bad" in told
    assert checkpoint.latest(folder) == 120
    assert read_metrics(folder)[-1]["step"] == 120
    assert not (folder / "SUMMARY.md").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_rest_is_as_if_there_had_been_none(
    tiny, finished, tmp_path, monkeypatch, capsys, number, code
):
    """It comes as the second line of metrics is written: the run stops within the third one."""
    monkeypatch.setattr("jaxwm.run.loop._DISPATCH", 0.0)  # dispatches of one iteration
    told = iter([0, number])

    def resident() -> int:
        signal.raise_signal(sent) if (sent := next(told, 0)) else None
        return 1

    monkeypatch.setattr("jaxwm.run.loop.resident_bytes", resident)
    folder = tmp_path / "run"
    assert cli.main([*command(tiny).split()[1:], "--run", str(folder)]) == code
    assert f"{signal.Signals(number).name} at step 84: saved" in capsys.readouterr().out
    assert checkpoint.latest(folder) == 84
    assert [line["step"] for line in read_metrics(folder)] == [40, 80]
    assert cli.main(["resume", str(folder)]) == 0
    assert plain(folder) == plain(finished) and len(read_metrics(folder)) == 5


VARYING = ("time", "memory/process")


def plain(folder) -> list[dict]:
    """The metrics of a run, but for what no two runs have alike."""
    return [{k: v for k, v in x.items() if k not in VARYING} for x in read_metrics(folder)]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(
    tiny, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    configs.write(tiny, folder / "config.json")
    (folder / "metrics.jsonl").write_text('{"step": 40, "upd')
    assert cli.main(["resume", str(folder)]) == 0
    assert "has no checkpoint yet: the run starts again" in capsys.readouterr().out
    assert plain(folder) == plain(finished)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_is_the_same(
    tiny, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "200" / "rest" / "manifest.ocdbt").write_bytes(b"")
    assert cli.main(["checkpoints", str(folder), "verify"]) == 1
    told = capsys.readouterr().out
    assert "  sound" in told and "rest/manifest.ocdbt has changed" in told
    assert cli.main(["resume", str(folder)]) == 0
    assert "checkpoints/200 is damaged: rest/manifest.ocdbt" in capsys.readouterr().out
    assert plain(folder) == plain(finished)
    assert cli.main(["checkpoints", str(folder), "prune"]) == 0
    assert capsys.readouterr().out == "Removed: 200.damaged.\n"
    assert cli.main(["checkpoints", str(folder), "verify"]) == 0
    like = jax.eval_shape(train.build(tiny).init)
    one, two = (checkpoint.restore(x, like, tiny) for x in (finished, folder))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), raw(one), raw(two))
    assert all(jax.tree.leaves(same))


def raw(state):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        state,
    )


def test_a_run_whose_disk_is_full_goes_on_and_says_so_at_its_end(
    tiny, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert cli.main([*command(tiny).split()[1:], "--run", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out.count("no space left") == 2 and "Traceback" not in err
    assert "has made its 200 steps, but its last checkpoint could not be written" in joined(err)
    assert cli.main(["resume", str(folder)]) == 0
    assert plain(folder) == plain(finished)


def joined(text: str) -> str:
    return " ".join(text.split())


def test_changed_entries_go_on_only_if_they_are_meant(tiny, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    optim = dataclasses.replace(tiny.agent.optim, learning_rate=2e-3)
    agent = dataclasses.replace(tiny.agent, optim=optim)
    configs.write(dataclasses.replace(tiny, agent=agent, steps=240), folder / "config.json")
    assert cli.main(["resume", str(folder)]) == 2
    told = joined(capsys.readouterr().err)
    assert "agent.optim.learning_rate: 0.002 here, 0.001 there" in told
    assert "--accept-changes" in told and checkpoint.latest(folder) == 200
    assert cli.main(["resume", str(folder), "--accept-changes"]) == 0
    assert checkpoint.latest(folder) == 240


def test_episodes_are_told_once_though_lines_come_at_other_steps_after_a_resume(
    tiny, finished, tmp_path
):
    """Lines lie 24 steps apart after step 200, which is no multiple of it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    configs.write(dataclasses.replace(tiny, steps=240, log_every=24), folder / "config.json")
    resume(folder, quiet=True)
    straight = tmp_path / "straight"
    run(dataclasses.replace(tiny, steps=240, log_every=8), straight, quiet=True)
    found, wanted = read_metrics(folder), read_metrics(straight)
    assert [line["step"] for line in found] == [40, 80, 120, 160, 200, 216, 240]
    between = [*zip([0, 40, 80, 120, 160, 200, 216], found, strict=True)]
    for start, line in between:
        told = [x["episode/count"] for x in wanted if start < x["step"] <= line["step"]]
        assert line["episode/count"] == sum(told)
    assert sum(line["episode/count"] for line in found[-2:]) > 0


@pytest.mark.parametrize("saved", [True, False], ids=["to_its_checkpoint", "to_its_start"])
def test_a_run_that_diverges_goes_back_and_gives_up_after_some_times(
    tiny, finished, tmp_path, capsys, saved
):
    """With a learning rate like this one no random numbers help."""
    folder = tmp_path / "run"
    optim = dataclasses.replace(tiny.agent.optim, learning_rate=1e30)
    agent = dataclasses.replace(tiny.agent, optim=optim)
    config = dataclasses.replace(tiny, agent=agent, on_divergence="rollback", steps=240)
    if saved:
        shutil.copytree(finished, folder)
    folder.mkdir(exist_ok=True)
    configs.write(config, folder / "config.json")
    assert cli.main(["resume", str(folder), "--accept-changes"]) == 2
    out, err = capsys.readouterr()
    assert out.count("goes back to its newest checkpoint") == 3
    assert "(attempt 3 of 3)" in out and "went back 3 times in vain" in joined(err)
    assert checkpoint.steps(folder) == ([120, 200] if saved else [])
    if saved:
        assert plain(folder) == plain(finished)
        found = checkpoint.restore(folder, train.build(tiny).shapes(), tiny)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found.agent.params))


@pytest.mark.no_cover
def test_a_sweep_leaves_curves_and_returns_of_each_setting(tiny, tmp_path, capsys):
    """One of the settings diverges: it is told, and the others go on."""
    folder = tmp_path / "run"
    words = ["--sweep", "learning_rate=1e-3,1e30", "behavior.unimix=0.5", "--seeds", "2"]
    with jax.debug_key_reuse(False):
        assert cli.main([*command(tiny).split()[1:], *words, "--run", str(folder)]) == 0
    told = capsys.readouterr().out
    for i in range(2):
        name = f"learning_rate=1e+30 unimix=0.5 seed {i}"
        assert f"The training of {name} diverged at update" in told
        assert f"evaluation return (learning_rate=0.001 unimix=0.5 seed {i}): " in told
        assert f"evaluation return ({name}): " in told
    summary = (folder / "SUMMARY.md").read_text()
    assert told.count(" (diverged)\n") == summary.count(" (diverged)\n") == 2
    assert cli.main(["eval", str(folder), "--episodes", "2"]) == 0
    assert capsys.readouterr().out.count("seed 0): ") == 2
    lines = read_metrics(folder)
    assert [x["seed"] for x in lines[:4]] == [0, 1, 0, 1]
    assert lines[0]["setting"] == lines[1]["setting"] == "learning_rate=0.001 unimix=0.5"
    assert (
        "--sweep learning_rate=1e-3,1e30 behavior.unimix=0.5" in (folder / "SUMMARY.md").read_text()
    )
    assert len(final.evaluate_run(folder, 2)) == 4
    one, two = (jaxwm.load(folder, member=i) for i in (0, 2))
    cue = np.ones(8, int)
    assert (one.act(cue)[1].carry.model.core != two.act(cue)[1].carry.model.core).any()
    with pytest.raises(JaxwmError, match="member is 4, and must be 0 to 3"):
        jaxwm.load(folder, member=4)
