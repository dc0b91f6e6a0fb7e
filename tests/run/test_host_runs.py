"""Runs of simulators on the host from start to end, with an agent that compiles in a second."""

import dataclasses

import jax
import numpy as np
import pytest
import scripted

from jaxwm import envs, train
from jaxwm.envs.host import HostConfig
from jaxwm.run import checkpoint
from jaxwm.run.log import read_metrics
from jaxwm.run.loop import resume, run
from jaxwm.run.saver import Saver
from jaxwm.types import JaxwmError
from tests.train import fake


@pytest.fixture(autouse=True)
def fake_recipe():
    with fake.registered():
        yield


def run_config(**changes):
    rhythm = {"prefill": 50, "pretrain": 2, "train_every": 12}
    return fake.run_config(
        "chain:chain",
        **{**rhythm, **changes},
        steps=240,
        host=HostConfig(workers=1, timeout=20.0),
        eval_episodes=3,
        log_every=40,
        save_every=120,
    )


@pytest.fixture
def own(monkeypatch):
    """Lets a configuration name an environment of this test's."""

    def give(env):
        monkeypatch.setitem(envs.OWN, "chain:chain", env)

    return give


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_run_from_start_to_end(place, own, tmp_path):
    own(scripted.chain())
    summary = run(run_config(place=place), tmp_path / "run", quiet=True)
    assert summary.returns.shape == (1, 3) and set(summary.returns[0]) <= {0.0, 1.0}
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [40, 80, 120, 160, 200, 240]
    assert {"host/waiting", "host/faults", "loss/total"} <= set(lines[-1])
    # jax alone takes a hundred megabytes; a worker with numpy in it some twenty.
    assert lines[-1]["memory/process"] > 5e7 > lines[-1]["memory/simulators"] > 5e6
    assert (tmp_path / "run" / "curve.png").exists()
    again = resume(tmp_path / "run", 320, quiet=True)
    assert again.steps == 320 and again.updates > summary.updates


def test_too_many_faults_save_and_stop_the_run(own, tmp_path):
    own(scripted.chain(fails_at=17))
    config = run_config()
    host = dataclasses.replace(config.host, max_faults=5)
    with pytest.raises(JaxwmError, match=r"(?s)stopped before step.*raised 6 times.*chain broke"):
        run(dataclasses.replace(config, host=host), tmp_path / "run", quiet=True)
    assert 4 * 34 <= checkpoint.latest(tmp_path / "run") < 240
    own(scripted.chain())
    assert resume(tmp_path / "run", 240, quiet=True).steps >= 240


def played(config, folder):
    """Two chunks, a checkpoint, and two more from it: states in numpy."""
    program = train.build(config, 10, scripted.chain())
    state = program.init()
    for _ in range(2):
        state, _ = program.chunk(state)
    with Saver(folder, config, pytest.fail) as saver:
        saver.save(1, state)
    saved = numbers(state)
    state = checkpoint.restore(folder, program.shapes(), config)
    restored = numbers(state)
    state = program.resume(state)
    for _ in range(2):
        state, _ = program.chunk(state)
    program.close()
    return program, saved, restored, numbers(state)


def numbers(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.array, jax.device_get(state))


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_replay_in_host_memory_is_saved_and_restored_as_one_on_the_device(tmp_path):
    configs = [run_config(place=place) for place in ("device", "host")]
    _, saved, restored, after = played(configs[0], tmp_path / "device")
    assert equal(saved, restored)
    program, *ours = played(configs[1], tmp_path / "host")
    for found, wanted in zip(ours, (saved, restored, after), strict=True):
        assert equal(found._replace(account=()), wanted._replace(account=()))
    # The place belongs to the run.
    with pytest.raises(JaxwmError, match=r"replay.place: 'host' here, 'device' there"):
        checkpoint.restore(tmp_path / "device", program.shapes(), configs[1])
