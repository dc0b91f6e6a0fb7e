"""The adapter of the control suite against dm_control itself."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxwm.envs import dm_control
from jaxwm.envs.check import validate
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.types import JaxwmError

pytest.importorskip("dm_control")


@pytest.fixture(scope="module")
def suite():
    return dm_control._suite("off")


def same(obs, row):
    assert set(obs) == set(row.observation)
    for key, value in row.observation.items():
        assert obs[key].dtype == np.float32
        np.testing.assert_array_equal(obs[key], np.float32(value))


def test_rows_equal_the_suite(suite):
    simulator = dm_control.make("cartpole-swingup").open()
    raw = suite.load("cartpole", "swingup", {"random": 3})
    same(simulator.reset(3), raw.reset())
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (1100, 1)).astype(np.float32)
    cuts = []
    for t, action in enumerate(actions):
        obs, reward, terminal, cut = simulator.step(action)
        row = raw.step(np.clip(action, -1, 1))
        same(obs, row)
        assert (reward, terminal, cut) == (row.reward, False, row.last())
        if cut:  # the last observation was kept; a new episode begins where the numbers stand
            cuts.append(t)
            same(simulator.reset(None), raw.reset())
    assert cuts == [999]
    simulator.close()


def test_actions_are_scaled_to_the_bounds(suite):
    env = dm_control.make("quadruped-walk")
    assert (env.action_space.shape, env.action_space.low, env.action_space.high) == ((12,), -1, 1)
    assert env.obs_space["torso_upright"].shape == ()
    simulator, raw = env.open(), suite.load("quadruped", "walk", {"random": 0})
    spec = raw.action_spec()
    assert len({*spec.minimum, *spec.maximum}) > 2  # bounds differ from joint to joint
    same(simulator.reset(0), raw.reset())
    for _ in range(3):
        same(simulator.step(np.ones(12, np.float32))[0], raw.step(spec.maximum))
        middle = (spec.minimum + spec.maximum) / 2
        same(simulator.step(np.zeros(12, np.float32))[0], raw.step(middle))
    simulator.close()


def test_only_a_discount_of_zero_is_terminal():
    simulator = dm_control.make("cartpole-swingup", time_limit=0.05).open()
    simulator.reset(0)
    ends = [simulator.step([0.0])[2:] for _ in range(5)]  # 5 steps of 0.01 s
    assert ends == [(False, False)] * 4 + [(False, True)]
    simulator.reset(None)
    simulator._env.task.get_termination = lambda physics: 0.0
    assert simulator.step([0.0])[2:] == (True, False)


def test_a_seed_determines_the_episodes():
    # The second makes a model with random numbers already when it is made.
    first, second = (dm_control.make("finger-spin").open() for _ in range(2))

    def episodes(simulator, seed):
        rows = [*simulator.reset(seed).values(), *simulator.step([0.3, -0.2])[0].values()]
        return np.concatenate([*rows, *simulator.reset(None).values()])

    want = episodes(first, 5)
    np.testing.assert_array_equal(episodes(second, 5), want)
    assert not np.array_equal(episodes(second, 6), want)
    np.testing.assert_array_equal(episodes(second, 5), want)  # whatever came before


def test_through_a_pool():
    env = dm_control.make("cartpole-swingup", time_limit=0.03)
    validate(env)
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        rows = [pool.reset()] + [pool.step(np.zeros((2, 1), np.float32)) for _ in range(5)]
        assert not sum(pool.faults.values())
    assert [row.is_first.tolist() for row in rows] == [[t in (0, 4)] * 2 for t in range(6)]
    assert [row.is_last.tolist() for row in rows] == [[t == 3] * 2 for t in range(6)]
    assert not any(row.is_terminal.any() for row in rows)
    assert rows[0].obs["position"].shape == (2, 3)
    assert len({row.obs["position"].tobytes() for row in rows}) == 6


def test_pictures_are_the_suites_own():
    try:
        env = dm_control.make("quadruped-walk:image", size=32)
    except JaxwmError as error:
        pytest.skip(str(error))
    validate(env)
    assert list(env.obs_space) == ["image"] and env.obs_space["image"].shape == (32, 32, 3)
    simulator = env.open()
    backend = dm_control._backend(os.environ.get("MUJOCO_GL"))
    raw = dm_control._suite(backend).load("quadruped", "walk", {"random": 1})
    seen = [simulator.reset(1)["image"]]
    raw.reset()
    np.testing.assert_array_equal(seen[0], raw.physics.render(32, 32, camera_id=2))
    for action in np.random.default_rng(0).uniform(-1, 1, (6, 12)):
        seen.append(simulator.step(action)[0]["image"])
        spec = raw.action_spec()
        raw.step(spec.minimum + (action + 1) / 2 * (spec.maximum - spec.minimum))
        np.testing.assert_array_equal(seen[-1], raw.physics.render(32, 32, camera_id=2))
    simulator.close()
    assert len({image.tobytes() for image in seen}) > 3
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        row = pool.step(np.zeros((2, 12), np.float32))
    assert row.obs["image"].shape == (2, 32, 32, 3) and row.obs["image"].std() > 10


def test_pictures_without_a_graphics_library(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "painting")
    with pytest.raises(JaxwmError, match=r"cannot draw here.*painting \(.*MUJOCO_GL=egl.*numbers"):
        dm_control.make("cartpole-swingup:image")
    with pytest.raises(JaxwmError, match="cannot draw here"):
        dm_control.make("quadruped-escape")  # draws its terrain
    # In a process that has not imported MuJoCo yet, it is not even that far.
    code = "from jaxwm.envs import dm_control; dm_control.names()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MuJoCo cannot be imported while MUJOCO_GL is painting" in run.stderr


def test_names_are_those_of_the_suite(suite):
    names = dm_control.names()
    assert len(names) == 2 * (len(suite.ALL_TASKS) - 2)
    assert {"ball_in_cup-catch", "humanoid_CMU-run", "cartpole-swingup:image"} <= set(names)
    with pytest.raises(JaxwmError, match=r"Did you mean .*cartpole-swingup"):
        dm_control.make("cartpole_swingup")
    with pytest.raises(JaxwmError, match="left out because its actions have no bounds"):
        dm_control.make("lqr-lqr_2_1")
    with pytest.raises(JaxwmError, match=r"option of dm_control/walker-run .*time_limit"):
        dm_control.make("walker-run", timelimit=3)
