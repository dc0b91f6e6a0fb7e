"""The command line: what it understands, prints and answers to the shell."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxwm
from jaxwm import cli, optim
from jaxwm.recipes import dreamer_v3
from jaxwm.run.report import command


@pytest.fixture
def started(monkeypatch):
    """What `jaxwm train` would run: one (config, folder, options) for each call."""
    calls = []

    def run(config, folder=None, **options):
        calls.append((config, folder, options))

    monkeypatch.setattr("jaxwm.run.loop.run", run)
    return calls


def test_help_version_and_nothing(capsys):
    assert cli.main([]) == 2
    assert "usage: jaxwm" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli._COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxwm {jaxwm.__version__}\n"
    assert cli.main(["train"]) == 2
    assert "usage: jaxwm train RECIPE" in capsys.readouterr().err


def test_the_version_is_that_of_the_package():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{jaxwm.__version__}"' in text


def test_names_and_submodules_arrive_when_used():
    assert jaxwm.make("toy/Memory").name == "toy/Memory"
    assert jaxwm.train.__name__ == "jaxwm.train"
    assert jaxwm.RunConfig is type(dreamer_v3.config("toy/Memory", "debug", None, None))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jaxwm.nonsense


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "dreamer_v3", "--help"]])
def test_the_help_of_train(words, capsys):
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert ("cartpole" in text) == ("dreamer_v3" in words)
    assert "--preset" in text and "--replay.train-ratio" in text and "--run" in text


@pytest.mark.parametrize("name", ["resume", "eval", "plot", "envs"])
def test_the_help_of_the_others(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: jaxwm {name}" in capsys.readouterr().out


def test_flags_change_entries_of_the_recipe(started):
    words = "train dreamer_v3 --env toy/Reach --size debug --variant paper --seed 3 --steps 9000"
    words += " --replay.train-ratio 64 --agent.optim.learning_rate=1e-3 --replay.no-online"
    words += " --agent.model.codec.mults 1 2 --run here --tensorboard"
    assert cli.main(words.split()) == 0
    ((config, folder, options),) = started
    default = dreamer_v3.config("toy/Reach", "debug", "paper", None)
    assert config.agent.optim.learning_rate == 1e-3
    assert config.agent.model.codec.mults == (1, 2)
    assert config.replay == dataclasses.replace(default.replay, train_ratio=64.0, online=False)
    assert (config.seed, config.steps, config.variant) == (3, 9000, "paper")
    assert config.agent.behavior == default.agent.behavior
    assert folder == Path("here") and options == {"tensorboard": True}


@pytest.mark.parametrize("preset", sorted(dreamer_v3.PRESETS))
def test_a_preset_is_a_configuration_of_which_flags_change_entries(preset, started):
    assert cli.main(["train", "dreamer_v3", "--preset", preset, "--seed", "7"]) == 0
    assert cli.main(["train", "dreamer_v3", f"--preset={preset}", "--env", "toy/Memory"]) == 0
    (one, folder, _), (two, _, _) = started
    default = dreamer_v3.config(None, None, None, preset)
    assert one == dataclasses.replace(default, seed=7)
    assert folder is None
    assert two.env == "toy/Memory"


def test_the_learning_rate_of_a_preset_falls_to_the_end_of_a_run_of_any_length(started):
    flags = ["", "--steps 64000", "--steps 64000 --replay.train-ratio 32 --replay.batch-size 8"]
    flags += ["--steps 64 --agent.optim.warmup-steps 50"]
    flags += ["--steps 64000 --agent.optim.learning_rate linear:1e-3:1e-4:0:8000"]
    for words in flags:
        assert cli.main(["train", "dreamer_v3", "--preset", "cartpole", *words.split()]) == 0
    # 16,000 steps * 64 / (4 * 32) are 8,000 updates.
    told = [config for config, _, _ in started]
    rates = [config.agent.optim.learning_rate for config in told]
    assert rates[:4] == [optim.Schedule(1e-3, 1e-4)] * 4
    assert [config.updates for config in told] == [8_000, 32_000, 8_000, 32, 32_000]
    solved = [optim.resolve(x.agent, x.updates).optim.learning_rate.updates for x in told]
    assert solved == [8_000, 32_000, 8_000, 32, 8_000]


def test_a_rate_is_a_number_or_a_schedule(started, capsys):
    words = ["train", "dreamer_v3", "--preset", "cartpole", "--agent.optim.learning-rate"]
    for text in ("2e-3", "cosine:2e-3:0.0", "exponential:1e-3:1e-5:10:100"):
        assert cli.main([*words, text]) == 0
    assert [config.agent.optim.learning_rate for config, _, _ in started] == [
        2e-3,
        optim.Schedule(2e-3, 0.0, "cosine"),
        optim.Schedule(1e-3, 1e-5, "exponential", 10, 100),
    ]
    for text, told in (
        ("fast", "--agent.optim.learning-rate should be a number, not 'fast'."),
        ("linear:1", "'linear:1' is not SHAPE:START:END[:WARMUP[:UPDATES]]"),
        ("linear:1e-3:1e-4:10:5", "Schedule.updates is 5, but it counts from the start"),
        ("linear:1e-3:-1e-4", "learning_rate is linear:0.001:-0.0001:0:0; it must be positive"),
    ):
        assert cli.main([*words, text]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_the_command_in_the_summary_makes_the_same_run(tiny, started):
    codec = dataclasses.replace(tiny.agent.model.codec, mults=(1, 2))
    model = dataclasses.replace(tiny.agent.model, codec=codec)
    replay = dataclasses.replace(tiny.replay, online=False, train_ratio=0.1)
    other = dataclasses.replace(
        tiny, replay=replay, seeds=2, agent=dataclasses.replace(tiny.agent, model=model)
    )
    for config in (tiny, other):
        assert cli.main(command(config).split()[1:]) == 0
    assert [config for config, _, _ in started] == [tiny, other]


def test_envs_are_listed(capsys):
    assert cli.main(["envs", "toy"]) == 0
    assert "toy/Memory" in capsys.readouterr().out.split()
    assert cli.main(["envs"]) == 0
    names = capsys.readouterr().out.split()
    assert {"toy/Memory", "gymnax/CartPole-v1", "brax/ant"} <= set(names)


def test_eval_repeats_the_line_of_the_summary(finished, capsys):
    assert cli.main(["eval", str(finished), "--episodes", "3"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("evaluation return: ") and line.count("\n") == 1
    assert f"    {line}" in (finished / "SUMMARY.md").read_text()
    # Each episode of toy/Memory returns 1 or -1.
    assert float(line.split()[-1]) in (-1.0, -0.333333, 0.333333, 1.0)


def test_plot_draws_and_names_its_picture(finished, tmp_path, capsys):
    path = tmp_path / "curve.png"
    assert cli.main(["plot", str(finished), "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def run(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxwm.run.loop.resume", run)
    assert cli.main(["resume", "somewhere"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_compiled_programs_are_kept_where_that_is_possible(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cli._keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli._keep_compiled_programs()
    kept = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert kept == tmp_path / ".cache" / "jaxwm" / "xla" and kept.is_dir()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    cli._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_PLATFORMS", "abacus"), ("JAX_DEFAULT_MATMUL_PRECISION", "utmost")]
)
def test_what_jax_cannot_be_told_is_said(name, value, tmp_path):
    words = [sys.executable, "-m", "jaxwm.cli", "train", "dreamer_v3", "--env", "toy/Memory"]
    words += ["--size", "debug", "--run", str(tmp_path / "run")]
    env = os.environ | {name: value}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "jax cannot begin" in done.stderr and f"{name}={value}" in done.stderr


def test_a_process_that_has_gone_is_told(monkeypatch, capsys):
    def lost(*_):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\nand more")

    monkeypatch.setattr(cli, "_dispatch", lost)
    with pytest.raises(ValueError, match="Gloo"):
        cli.main(["envs"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert cli.main(["envs"]) == 2
    told = capsys.readouterr().err
    assert "has gone (UNKNOWN: Gloo AllGather failed: Connection closed by peer). Start all" in told


def test_the_shell_gets_2_and_a_paragraph():
    words = [sys.executable, "-m", "jaxwm.cli", "trian"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "jaxwm: There is no command called 'trian'. Did you mean train?\n"
