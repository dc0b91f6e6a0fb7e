"""The adapter of EnvPool against its other interface, that of dm_env."""

import numpy as np
import pytest

from jaxwm.envs import envpool as adapter
from jaxwm.envs.check import validate
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.types import Box, Discrete, JaxwmError

envpool = pytest.importorskip("envpool")
FIRST, LAST = 0, 2  # steps in dm_env


def agree(name, steps, limit, actions, see, over=lambda obs: np.zeros(3, bool), **options):
    """A batch of 3 against EnvPool's own; returns the numbers of true ends and of cuts.

    Ends come where `over` says so and cuts after `limit` steps. EnvPool's discount is no help: in
    classic control it is 0 at the limit too.
    """
    options["max_episode_steps"] = limit
    batch = adapter.make(name, **options).batch(3)
    raw = envpool.make_dm(name, num_envs=3, seed=11, **options)

    def same(obs, row):
        want = see(row.observation)
        assert set(obs) == set(want)
        for key, value in want.items():
            np.testing.assert_array_equal(obs[key], value)

    same(batch.reset(11), raw.reset())
    ended, elapsed = np.zeros(3, bool), np.zeros(3, int)
    terminals = cuts = 0
    for given, taken in actions(steps):
        obs, reward, terminal, cut = batch.step(given)
        row = raw.step(taken)
        same(obs, row)
        np.testing.assert_array_equal(reward, row.reward)
        np.testing.assert_array_equal(terminal | cut, row.step_type == LAST)
        elapsed = np.where(ended, 0, elapsed + 1)
        np.testing.assert_array_equal(cut, elapsed == limit)
        np.testing.assert_array_equal(terminal, over(row.observation) & ~cut)
        np.testing.assert_array_equal(row.step_type == FIRST, ended)  # a new episode comes next
        ended = terminal | cut
        terminals, cuts = terminals + terminal.sum(), cuts + cut.sum()
    batch.close()
    return terminals, cuts


def test_classic_control_equals_the_package():
    def actions(steps):
        for action in np.random.default_rng(0).integers(2, size=(steps, 3)):
            yield action.astype(np.int32), action.astype(np.int32)

    def fallen(obs):
        return (abs(obs.obs[:, 0]) > 2.4) | (abs(obs.obs[:, 2]) > np.deg2rad(12))

    def see(obs):
        return {"vector": obs.obs}

    terminals, cuts = agree("CartPole-v1", 1000, 20, actions, see, fallen)
    assert terminals > 20 and cuts > 20


def test_control_suite_equals_the_package():
    def actions(steps):
        for action in np.random.default_rng(0).uniform(-1, 1, (steps, 3, 1)):
            yield action.astype(np.float32), action.astype(np.float32).astype(np.float64)

    def see(obs):
        return {k: np.float32(getattr(obs, k)) for k in ("position", "velocity")}

    ends = agree("CartpoleSwingup-v1", 1000, 300, actions, see)
    assert ends == (0, 9)


def test_pictures_have_their_channels_last():
    def actions(steps):
        for action in np.random.default_rng(0).integers(6, size=(steps, 3)):
            yield action.astype(np.int32), action.astype(np.int32)

    assert adapter.make("Pong-v5").obs_space == {"image": Box((96, 96, 1), "uint8", 0.0, 255.0)}
    options = {**adapter.ATARI, "img_height": 64, "img_width": 48, "gray_scale": False}
    space = adapter.make("Pong-v5", **options).obs_space
    assert space == {"image": Box((64, 48, 3), "uint8", 0.0, 255.0)}
    agree("Pong-v5", 100, 60, actions, lambda x: {"image": x.obs.transpose(0, 2, 3, 1)}, **options)


def test_actions_are_scaled_to_the_bounds():
    def actions(steps):
        for action in np.random.default_rng(0).uniform(-1.5, 1.5, (steps, 3, 1)):
            action = action.astype(np.float32)
            yield action, 2 * np.clip(action, -1, 1)  # Pendulum's torque lies in -2..2

    assert adapter.make("Pendulum-v1").action_space == Box((1,), "float32", -1.0, 1.0)
    ends = agree("Pendulum-v1", 250, 200, actions, lambda obs: {"vector": obs.obs})
    assert ends == (0, 3)


def test_spaces_of_every_kind():
    grid = adapter.make("MiniGrid-Empty-5x5-v0")
    assert grid.obs_space == {
        "direction": Discrete(4),
        "image": Box((7, 7, 3)),  # codes, no picture
        "mission": Box((96,)),
    }
    cube = adapter.make("RubiksCube-v0")
    assert cube.action_space == Discrete((6, 1, 3), (3,))
    assert adapter.make("Taxi-v3").obs_space == {"index": Discrete(500)}
    puzzle = adapter.make("FlatPack-v0").obs_space["action_mask"]
    assert puzzle == Discrete(2, (25 * 4 * 9 * 9,))  # rows have three axes at most
    for env in (grid, cube):
        validate(env)


def test_one_simulator_of_its_own():
    env = adapter.make("CartPole-v1")
    one, two = env.open(), env.open()
    first = one.reset(5)["vector"]
    np.testing.assert_array_equal(first, two.reset(5)["vector"])
    assert first.shape == (4,)
    terminal = False
    while not terminal:
        obs, reward, terminal, cut = one.step(np.int32(1))
    assert (reward, cut) == (1.0, False)
    assert abs(obs["vector"][2]) > 0.2  # the pole has fallen: the last observation is kept
    again = one.reset(None)["vector"]
    assert abs(again).max() <= 0.05 and not np.array_equal(again, first)
    assert not np.array_equal(two.reset(6)["vector"], first)
    assert abs(env.open().reset(None)["vector"]).max() <= 0.05
    one.close()


def test_through_a_pool():
    env = adapter.make("CartpoleSwingup-v1", max_episode_steps=3)
    validate(env)
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        rows = [pool.reset()] + [pool.step(np.zeros((2, 1), np.float32)) for _ in range(5)]
        assert not sum(pool.faults.values())
    assert [row.is_first.tolist() for row in rows] == [[t in (0, 4)] * 2 for t in range(6)]
    assert [row.is_last.tolist() for row in rows] == [[t == 3] * 2 for t in range(6)]
    assert not any(row.is_terminal.any() for row in rows)
    assert rows[0].obs["position"].shape == (2, 3)
    assert not np.array_equal(rows[0].obs["position"], rows[4].obs["position"])


def test_errors_name_the_way_out():
    assert {"Pong-v5", "CartPole-v1", "CartpoleSwingup-v1"} <= set(adapter.names())
    with pytest.raises(JaxwmError, match=r"Did you mean .*Breakout-v5"):
        adapter.make("Breakout")
    with pytest.raises(JaxwmError, match=r"option of envpool/Pong-v5 .*stack_num"):
        adapter.make("Pong-v5", stack=1)
    with pytest.raises(JaxwmError, match=r"cannot be made with .*stack_num"):
        adapter.make("Pong-v5", stack_num="four")
    with pytest.raises(JaxwmError, match="several players"):
        adapter.make("TicTacToe-v1")
    with pytest.raises(JaxwmError, match=r"no bounds.*use_combined_action"):
        adapter.make("TakeCover-v1")
    assert adapter.make("TakeCover-v1", use_combined_action=True).action_space == Discrete(3)


def test_a_missing_library_is_told():
    try:
        adapter.make("CoinrunEasy-v0")
    except JaxwmError as error:
        assert "needs a library of the system" in str(error) and "Qt" in str(error)
    else:
        pytest.skip("Qt 5 is installed")
