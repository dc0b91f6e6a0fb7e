"""The adapter of Crafter against the package itself."""

import numpy as np
import pytest

from jaxwm.envs import crafter as adapter
from jaxwm.envs.check import validate
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.types import JaxwmError

crafter = pytest.importorskip("crafter")


class OrderedSet(dict):
    """What Crafter takes for a set in these tests, so that its seed determines the game."""

    def __init__(self, items=()):
        super().__init__(dict.fromkeys(items))

    def add(self, item):
        self.setdefault(item)

    def remove(self, item):
        self.pop(item)


def test_rows_equal_the_package(monkeypatch):
    monkeypatch.setattr(crafter.engine, "set", OrderedSet, raising=False)
    simulator, raw = adapter.make("reward", area=32).open(), crafter.Env((32, 32), seed=0)
    np.testing.assert_array_equal(simulator.reset(0)["image"], raw.reset())
    ends = rewards = 0
    for action in np.random.default_rng(0).integers(17, size=1000):
        obs, reward, terminal, cut = simulator.step(action)
        image, raw_reward, done, info = raw.step(action)
        np.testing.assert_array_equal(obs["image"], image)
        assert (reward, terminal, cut) == (raw_reward, info["discount"] == 0, False)
        rewards += reward != 0
        if done:
            ends += 1
            np.testing.assert_array_equal(simulator.reset(None)["image"], raw.reset())
    assert ends and rewards


def test_a_seed_determines_the_game_without_help():
    raw = crafter.Env((32, 32), seed=0)
    first, second = (adapter.make("reward", area=32).open() for _ in range(2))
    want = raw.reset()  # worlds are the package's; in it only the creatures to vanish differ
    np.testing.assert_array_equal(first.reset(0)["image"], want)
    np.testing.assert_array_equal(second.reset(0)["image"], want)
    for action in np.random.default_rng(1).integers(17, size=200):  # two of the package part before
        one, two = first.step(action), second.step(action)
        np.testing.assert_array_equal(one[0]["image"], two[0]["image"])
        assert one[1:] == two[1:]
        if one[2]:
            break


def test_death_is_terminal_and_the_limit_is_not():
    simulator = adapter.make("noreward", length=3, area=9).open()
    simulator.reset(0)
    assert [simulator.step(0)[1:] for _ in range(3)] == [(0.0, False, c) for c in (0, 0, 1)]
    simulator._env._player.health = 0  # it dies beyond the limit
    obs, reward, terminal, cut = simulator.step(0)
    assert (reward, terminal, cut) == (0.0, True, False)
    assert obs["image"].shape == (64, 64, 3) and obs["image"].dtype == np.uint8


def test_through_a_pool():
    validate(adapter.make("reward"))
    env = adapter.make("reward", length=2, area=12)
    assert env.action_space.classes == 17
    assert env.obs_space["image"].shape == (64, 64, 3)
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        rows = [pool.reset()] + [pool.step(np.ones(2, np.int32)) for _ in range(3)]
        assert not sum(pool.faults.values())
    assert [row.is_first.tolist() for row in rows] == [[t in (0, 3)] * 2 for t in range(4)]
    assert [row.is_last.tolist() for row in rows] == [[t == 2] * 2 for t in range(4)]
    assert not any(row.is_terminal.any() for row in rows)
    images = rows[0].obs["image"]
    assert not np.array_equal(images[0], images[1])


def test_errors_name_the_way_out():
    assert adapter.names() == ["reward", "noreward"]
    with pytest.raises(JaxwmError, match=r"Did you mean .*noreward"):
        adapter.make("norewards")
    with pytest.raises(JaxwmError, match="size must be at least 9, but it is 8"):
        adapter.make("reward", size=8)
