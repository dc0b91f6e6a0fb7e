"""Gymnasium environments on the host: spaces, agreement with gymnasium itself, broken ones."""

import os
import re
import time

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from jaxwm import envs
from jaxwm.envs import gymnasium as adapter
from jaxwm.envs.examine import examine
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.types import Box, Discrete, JaxwmError

ONE = HostConfig(workers=1, timeout=20.0)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Discrete(3, start=-1), {"index": Discrete(3)}),
        (spaces.MultiDiscrete([3, 3]), {"vector": Discrete(3, (2,))}),
        (spaces.MultiDiscrete([2, 4]), {"vector": Discrete((2, 4), (2,))}),
        (spaces.MultiBinary([2, 3]), {"vector": Discrete(2, (2, 3))}),
        (spaces.Box(-1, 2, (3,), np.float64), {"vector": Box((3,), "float32", -1.0, 2.0)}),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), {"image": Box((4, 4, 3), "uint8", 0.0, 255.0)}),
        (
            spaces.Box(np.array([0, -np.inf], np.float32), np.array([1, np.inf], np.float32)),
            {"vector": Box((2,), "float32", (0.0, -np.inf), (1.0, np.inf))},
        ),
        (
            spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple((spaces.Box(0, 1, ()),))),
            {"a": Discrete(2), "b.0": Box((), "float32", 0.0, 1.0)},
        ),
    ],
)
def test_spaces_and_values(space, expected):
    assert adapter._named(adapter.flatten("it", space)) == expected
    space.seed(0)
    for _ in range(5):
        found = adapter.entries(space, space.sample())
        assert list(found) == list(expected)
        for name, part in expected.items():
            assert np.shape(found[name]) == part.shape
            if isinstance(part, Discrete):
                assert (np.asarray(found[name]) >= 0).all()


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Discrete(3, start=5), np.int32(2), 7),
        (spaces.MultiBinary(2), np.array([0, 1], np.int32), [0, 1]),
        (spaces.Box(np.float32([0, -2]), np.float32([4, 2])), np.float32([-0.5, 9]), [1, 2]),
        (
            spaces.Dict(arm=spaces.Box(-3, 3, (1,)), grip=spaces.Tuple((spaces.Discrete(2),))),
            {"arm": np.float32([1]), "grip.0": np.int32(1)},
            {"arm": [3], "grip": (1,)},
        ),
    ],
)
def test_actions(space, action, expected):
    found = adapter.nested(space, action)
    assert space.contains(found)
    np.testing.assert_equal(found, expected)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Text(3), "is a Text, which has no fixed shape"),
        (spaces.Box(-np.inf, np.inf, (2,)), "Box with an infinite bound"),
    ],
)
def test_spaces_that_cannot_be_taken(space, words):
    with pytest.raises(JaxwmError, match=words):
        adapter.flatten("The action", space, action=True)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "CartPole-v1:vector"])
def test_a_thousand_steps_as_gymnasium_makes_them(name):
    """The first simulator of a pool beside an environment of gymnasium's own, seeded alike."""
    base = name.removesuffix(":vector")
    env, own = envs.make(f"gymnasium/{name}"), gymnasium.make(base).unwrapped
    limit = gymnasium.spec(base).max_episode_steps
    rng = np.random.default_rng(0)
    with Pool(env, 1, ONE) as pool:
        row, elapsed, ends = pool.reset(), 0, 0
        for _ in range(1000):
            if row.is_last[0]:
                row, ends = pool.step(np.zeros_like(row.action)), ends + 1
            if row.is_first[0]:
                assert row.reward[0] == 0 and not row.is_last[0]
                own.reset()
                seen, elapsed = row.obs["vector"][0].astype(float), 0
                # The same state: gymnasium's are read off its observations.
                own.state = [np.arctan2(seen[1], seen[0]), seen[2]] if base[0] == "P" else seen
            if isinstance(env.action_space, Box):
                action = rng.uniform(-1, 1, (1, 1)).astype(np.float32)
                raw = 2 * action[0]
            else:
                action = rng.integers(2, size=1).astype(np.int32)
                raw = int(action[0])
            row = pool.step(action)
            obs, reward, terminal, *_ = own.step(raw)
            elapsed += 1
            # float32 states against float64 ones; a pendulum doubles errors every second or so
            np.testing.assert_allclose(row.obs["vector"][0], obs, atol=2e-3)
            np.testing.assert_allclose(row.reward[0], reward, atol=2e-3)
            assert row.is_terminal[0] == terminal
            assert row.is_last[0] == (terminal or elapsed == limit)
            own.state = np.asarray(own.state)
    assert ends >= 4


class Walk(gymnasium.Env):
    """A good environment; its children break one thing each."""

    observation_space = spaces.Dict(place=spaces.Box(-50, 50, (1,)), odd=spaces.Discrete(2))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.place = 0, float(self.np_random.uniform())
        return self.look(), {}

    def step(self, action):
        self.time, self.place = self.time + 1, self.place + 2 * int(action) - 1
        return self.look(), self.reward(), self.place < -3, self.time >= 9, {}

    def reward(self):
        return self.place

    def look(self):
        return {"place": np.float32([self.place]), "odd": self.time % 2}


def broken(words, **changes):
    """A `Walk` with other methods or attributes, and what should be said of it."""
    return pytest.param(type("Broken", (Walk,), changes), words, id=words)


def old_reset(self, *, seed=None, options=None):
    return Walk.reset(self, seed=seed)[0]


def old_step(self, action):
    obs, reward, terminal, cut, info = Walk.step(self, action)
    return obs, reward, terminal or cut, info


def seedless(self):
    return Walk.reset(self)


def wild(self, *, seed=None, options=None):
    out = Walk.reset(self, seed=seed)
    self.place = float(np.random.default_rng().uniform())
    return self.look(), out[1]


def step_with(**values):
    """A step with some of its five results replaced."""
    names = ("obs", "reward", "terminated", "truncated", "info")

    def step(self, action):
        out = Walk.step(self, action)
        return tuple(values.get(name, x) for name, x in zip(names, out, strict=True))

    return step


def sees(**values):
    return lambda self: {**Walk.look(self), **values}


def late(self, action):
    if self.time == 4:
        raise ZeroDivisionError("the wheel is off")
    return Walk.step(self, action)


def unmade(self):
    raise OSError("no display")


BROKEN = [
    broken("has no observation_space", observation_space=None),
    broken("has no action_space", action_space=None),
    broken("is a Text, which has no fixed shape", action_space=spaces.Text(2)),
    broken("is a Sequence, which has no", observation_space=spaces.Sequence(spaces.Discrete(2))),
    broken("infinite bound", action_space=spaces.Box(-np.inf, np.inf, (1,))),
    broken("infinite bound", action_space=spaces.Dict(a=spaces.Box(0, np.inf, (1,)))),
    broken("is a tuple, but a gymnasium space", observation_space=(4,)),
    broken("is a int, but a gymnasium space", action_space=4),
    broken("cannot be made: OSError: no display", __init__=unmade),
    broken("reset does not take a seed", reset=seedless),
    broken("reset returned .* but a pair is expected", reset=old_reset),
    broken("step returned .* but five things are expected", step=old_step),
    broken("terminated as 0, but True or False", step=step_with(terminated=0)),
    broken("truncated as None, but True or False", step=step_with(truncated=None)),
    broken("terminated as array", step=step_with(terminated=np.array([True]))),
    broken("the reward is .*, not one number", step=step_with(reward=np.ones(1))),
    broken("the reward is None, not one number", step=step_with(reward=None)),
    broken("the reward is 'much', not one number", step=step_with(reward="much")),
    broken("the reward is nan", step=step_with(reward=float("nan"))),
    broken("the reward is inf", step=step_with(reward=float("inf"))),
    broken("observation 'place' holds a NaN", look=sees(place=np.float32([np.nan]))),
    broken("observation 'place' holds a NaN", look=sees(place=np.float32([np.inf]))),
    broken(r"'place' came as float32 of shape \(2,\)", look=sees(place=np.zeros(2, np.float32))),
    broken(r"'place' came as float64 of shape \(\)", look=sees(place=0.5)),
    broken("'place' came as object", look=sees(place=np.array([None]))),
    broken("'place' came as <U4", look=sees(place=np.array(["here"]))),
    broken("'odd' came as float64", look=sees(odd=0.5)),
    broken("'odd' is 2, but its classes are 2", look=sees(odd=2)),
    broken("'odd' is -1, but its classes are 2", look=sees(odd=-1)),
    broken("'place' holds 60, but its space has the bounds", look=sees(place=np.float32([60]))),
    broken("not nested as its space", look=lambda self: {"place": np.zeros(1, np.float32)}),
    broken("not nested as its space", look=lambda self: 3.0),
    broken("not nested as its space", look=lambda self: None),
    broken("uint8 is expected", look=sees(place=np.zeros((8, 8, 3), np.float32)),
           observation_space=spaces.Dict(place=spaces.Box(0, 255, (8, 8, 3), np.uint8),
                                         odd=spaces.Discrete(2))),
    broken("Use 0 to 3 axes",
           look=sees(place=np.zeros((8, 8), np.uint8)),
           observation_space=spaces.Dict(place=spaces.Box(0, 255, (8, 8, 1, 1), np.uint8),
                                         odd=spaces.Discrete(2))),
    broken("has a name that rows use themselves",
           observation_space=spaces.Dict(reward=spaces.Discrete(2))),
    broken("ZeroDivisionError: the wheel is off", step=late),
    broken("does something else after the same actions", reset=wild),
    broken("does something else after the same actions",
           reward=lambda self: float(np.random.default_rng().uniform())),
    broken("It hung", step=lambda self, action: time.sleep(99)),
    broken("It died", step=lambda self, action: os._exit(5)),
]  # fmt: skip


def verdict(factory) -> str:
    """What the checker says, whether it refuses at once or after a look."""
    try:
        result = examine(envs.own(factory), count=1, steps=25)
    except JaxwmError as error:
        return str(error)
    return "\n".join(result.faults)


def test_a_good_one_has_no_fault():
    assert len(BROKEN) >= 40
    result = examine(envs.own(Walk), count=1, steps=60)
    assert result.faults == () and result.episodes > 4
    assert result.steps_per_second > 0 and result.state_bytes > 0


@pytest.mark.parametrize(("factory", "words"), BROKEN)
def test_each_fault_is_named(factory, words, monkeypatch):
    monkeypatch.setattr("jaxwm.envs.examine._TIMEOUT", 2.0)
    monkeypatch.setattr("jaxwm.envs.examine._ENOUGH", 1)
    assert re.search(words, verdict(factory)), verdict(factory)


def test_names_and_options():
    assert "CartPole-v1" in adapter.names()
    assert envs.make("gymnasium/MountainCar-v0", max_episode_steps=7).name
    with pytest.raises(JaxwmError, match="Did you mean CartPole-v1"):
        adapter.make("CartPoll-v1")
    with pytest.raises(JaxwmError, match="would import the module os"):
        adapter.make("os:CartPole-v1")
    with pytest.raises(JaxwmError, match="no vector implementation"):
        adapter.make("MountainCarContinuous-v0:vector")
