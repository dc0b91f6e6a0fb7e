"""Every recipe through everything that a run does on the device, by the public functions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jaxwm
from jaxwm import train
from jaxwm.evaluate.final import evaluate_run
from jaxwm.recipes import RunConfig
from jaxwm.run import checkpoint, loop, resume, run, weights
from jaxwm.run.log import Logger, read_metrics
from jaxwm.run.report import Summary
from jaxwm.types import Box, as_dict
from tests.conformance.cases import NAMES, small
from tests.faults.damage import bits, copy, steady, train_words

ROOT = Path(__file__).resolve().parents[2]
KILLED = 200  # steps


class Done(NamedTuple):
    """A finished run, and its folder as it was at a line of metrics between two checkpoints."""

    config: RunConfig
    summary: Summary
    folder: Path
    killed: Path


def wait_for(run: Path, step: int) -> None:
    """Returns once the saver's thread has written a checkpoint and everything that goes with it."""
    calm = 0
    while calm < 20:
        names = [path.name for path in (run / checkpoint.FOLDER).iterdir()]
        settled = str(step) in names and not any(name.startswith(".") for name in names)
        calm = calm + 1 if settled else 0
        time.sleep(0.02)


@pytest.fixture(scope="module", params=NAMES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp(request.param)
    config, whole, killed = small(request.param), folder / "run", folder / "killed"

    class Watched(Logger):
        """Copies the folder when a line of metrics is about to be written.

        A process that is killed at that moment leaves the same files.
        """

        def write(self, step, updates, metrics):
            if step == KILLED:
                wait_for(whole, 160)
                copy(whole, killed)
            super().write(step, updates, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Logger", Watched)
        summary = run(config, whole, quiet=True)
    return Done(config, summary, whole, killed)


def test_it_trains_and_evaluates(done):
    config, summary, folder, _ = done
    assert summary.steps == config.steps and summary.updates > 3
    assert summary.returns.shape == (1, config.eval_episodes)
    assert np.isfinite(summary.returns).all()
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(40, config.steps + 1, 40))
    last = lines[-1]
    assert last["updates"] == summary.updates and last["updates/refused"] == 0
    learned = [x for x in last if x.startswith(("loss/", "grad_norm"))]
    assert len(learned) > 1 and all(np.isfinite(last[x]) for x in learned)


def test_a_killed_run_continues_bit_for_bit(done):
    _, _, folder, killed = done
    assert read_metrics(killed)[-1]["step"] == KILLED - 40
    assert checkpoint.latest(killed) == 160
    summary = resume(killed, quiet=True)
    assert steady(killed) == steady(folder) and state_of(killed) == state_of(folder)
    np.testing.assert_array_equal(summary.returns, done.summary.returns)


def test_it_is_evaluated_again(done):
    config, summary, folder, _ = done
    again = evaluate_run(folder, config.eval_episodes)
    np.testing.assert_allclose(again, summary.returns, rtol=1e-5)
    assert np.isfinite(evaluate_run(folder, config.eval_episodes, seed=5)).all()


def test_it_draws_what_there_is_to_show(done):
    config, _, folder, _ = done
    env = train.make_env(config)
    model = train.agents(config, env)({}).model
    assert (folder / "curve.png").stat().st_size > 1000
    assert (folder / "dream.png").exists() == (model is not None)
    text = (folder / "SUMMARY.md").read_text("utf-8")
    assert "curve.png" in text and ("dream.png" in text) == (model is not None)


def test_it_is_exported_and_loaded(done, tmp_path):
    folder = done.folder
    exported = weights.export(folder, tmp_path / "weights")
    policies = [jaxwm.load(path) for path in (folder, exported)]
    obs = {
        name: np.zeros(space.shape, space.dtype) for name, space in policies[0].obs_space.items()
    }
    state = [None, None]
    for _ in range(3):
        found = [policy.act(obs, x) for policy, x in zip(policies, state, strict=True)]
        actions, state = [x[0] for x in found], [x[1] for x in found]
        jax.tree.map(np.testing.assert_array_equal, *actions)
    for name, space in as_dict(policies[0].action_space).items():
        action = as_dict(actions[0])[name]
        assert action.shape == space.shape and action.dtype == space.dtype
        if isinstance(space, Box):
            assert (np.abs(action) <= 1).all()
        else:
            assert (action >= 0).all() and (action < np.asarray(space.classes)).all()
    greedy = [jaxwm.load(folder, seed=seed, mode="greedy").act(obs)[0] for seed in (0, 0)]
    jax.tree.map(np.testing.assert_array_equal, *greedy)


def test_a_process_that_is_killed_loses_nothing(tmp_path):
    """SIGKILL for real, of the recipe that compiles in the shortest time."""
    # Thirty checkpoints take seconds, so the kill after the first one comes in time.
    config = small("ppo", ("toy/Credit",), steps=12_000, log_every=400, save_every=400)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-m", "jaxwm.cli", *train_words(config, killed)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths})
    try:
        deadline = time.monotonic() + 200
        while not (killed.exists() and checkpoint.steps(killed)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.latest(killed) < config.steps
    resume(killed, quiet=True)
    run(checkpoint.read_config(killed), whole, quiet=True)
    assert steady(killed) == steady(whole) and state_of(killed) == state_of(whole)


def state_of(folder: Path) -> str:
    """A digest of the state in a run's newest checkpoint."""
    config = checkpoint.read_config(folder)
    return bits(checkpoint.restore(folder, train.build(config).shapes(), config, pytest.fail))
