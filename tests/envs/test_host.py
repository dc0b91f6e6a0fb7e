"""Simulators in worker processes: rows, time limits, and every way to fail."""

import logging
import time

import numpy as np
import pytest
import scripted
from scripted import CRASH, DTYPE, EXIT, GOOD, HANG, KEYS, LENGTH, NAN, RAISE, REWARD, SHAPE

from jaxwm.envs import host
from jaxwm.envs.host import HostConfig, Pool, TooManyFaults, limit_and_repeat
from jaxwm.types import Box, HostEnv, JaxwmError


def actions(first: int, count: int = 4) -> np.ndarray:
    """`first` for the first simulator, nothing special for the others."""
    return np.array([first] + [GOOD] * (count - 1), np.int32)


@pytest.fixture(scope="module")
def pool():
    """Four simulators in two processes."""
    config = HostConfig(workers=2, timeout=2.0)
    with Pool(scripted.scripted(), 4, config, seed=1) as made:
        yield made


def test_rows_follow_the_time_table(pool):
    row = pool.reset()
    assert row.is_first.all() and not row.is_last.any() and (row.reward == 0).all()
    assert len(set(row.obs["vector"][:, 0])) == 4  # every simulator has its own seed
    episode = row.obs["vector"][0, 1]
    for step in range(1, LENGTH + 1):
        given = np.full(4, GOOD, np.int32)
        row = pool.step(given)
        assert (row.obs["vector"][:, 2] == step).all() and (row.reward == step).all()
        assert (row.is_last == (step == LENGTH)).all() and not row.is_first.any()
    assert row.is_terminal.all()
    # The action after the last row is ignored: even one that would do harm.
    row = pool.step(np.full(4, EXIT, np.int32))
    assert row.is_first.all() and (row.action == 0).all() and (row.reward == 0).all()
    assert not row.is_last.any() and not row.is_terminal.any()
    assert row.obs["vector"][0].tolist() == [row.obs["vector"][0, 0], episode + 1, 0]
    assert row.obs["vector"].dtype == np.float32


def test_rows_are_not_overwritten_by_later_ones(pool):
    before = pool.reset()
    pool.step(actions(GOOD))
    assert (before.obs["vector"][:, 2] == 0).all() and before.is_first.all()


def test_a_row_shows_the_action_that_led_to_it(pool):
    pool.reset()
    given = np.array([GOOD, GOOD, 0, GOOD], np.int32)
    assert pool.step(given).action.tolist() == given.tolist()


def test_simulators_get_boxes_within_their_bounds():
    class Echo:
        def reset(self, seed):
            return {"seen": np.zeros(2, np.float32)}

        def step(self, action):
            return {"seen": action}, 0.0, False, False

        def close(self):
            pass

    box = Box((2,), low=-1.0, high=1.0)
    env = HostEnv("test/Echo", {"seen": Box((2,))}, box, Echo)
    with Pool(env, 1, HostConfig(workers=1)) as made:
        made.reset()
        row = made.step(np.array([[-0.5, 1.5]], np.float32))
    assert row.obs["seen"].tolist() == [[-0.5, 1.0]]
    assert row.action.tolist() == [[-0.5, 1.5]]  # what the agent drew


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (RAISE, "raised", "RuntimeError: the gripper is stuck"),
        (NAN, "bad value", "observation 'vector' holds a NaN"),
        (REWARD, "bad value", "the reward is inf"),
        (SHAPE, "bad shape or type", "float64 of shape (4,), but its space has shape (3,)"),
        (DTYPE, "bad shape or type", "numbers are expected"),
        (KEYS, "bad shape or type", "['camera', 'vector'], but the space has ['vector']"),
    ],
)
def test_a_fault_costs_one_simulator_its_episode(pool, caplog, action, kind, words):
    pool.reset()
    pool.step(actions(GOOD))
    before = pool.faults[kind]
    with caplog.at_level(logging.WARNING, "jaxwm"):
        row = pool.step(actions(action))
    assert pool.faults[kind] == before + 1
    assert row.is_first.tolist() == [True, False, False, False] and not row.is_last.any()
    assert row.reward.tolist() == [0, 2, 2, 2] and row.obs["vector"][0, 2] == 0
    assert np.isfinite(row.obs["vector"]).all()
    assert words in caplog.text and "environment 0" in caplog.text


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (EXIT, "died", "exit code 7"),
        (CRASH, "died", "signal SIGSEGV"),
        (HANG, "hung", "in step"),
    ],
)
def test_a_process_is_replaced(pool, caplog, action, kind, words):
    pool.reset()
    pool.step(actions(GOOD))
    before = pool.faults[kind]
    with caplog.at_level(logging.WARNING, "jaxwm"):
        row = pool.step(actions(action))
    assert pool.faults[kind] == before + 1
    # Its neighbour in the process begins anew too; the other process has seen nothing.
    assert row.is_first.tolist() == [True, True, False, False] and not row.is_last.any()
    assert row.reward.tolist() == [0, 0, 2, 2]
    assert words in caplog.text and "1 other simulators" in caplog.text
    assert pool.step(actions(GOOD)).reward.tolist() == [1, 1, 3, 3]


def test_a_hundred_faults_of_each_quick_kind(pool):
    pool.reset()
    kinds = {RAISE: "raised", NAN: "bad value", SHAPE: "bad shape or type"}
    before = dict(pool.faults)
    for action in kinds:
        for _ in range(100):
            row = pool.step(actions(action))
            while row.is_last[0]:
                row = pool.step(actions(GOOD))
            assert row.is_first[0] and np.isfinite(row.obs["vector"]).all()
    assert {k: pool.faults[k] - before[k] for k in kinds.values()} == dict.fromkeys(
        kinds.values(), 100
    )


def test_time_limit_and_repeat():
    env = limit_and_repeat(scripted.scripted(terminal=False, length=9), limit=2, repeat=3)
    simulator = env.open()
    simulator.reset(0)
    obs, reward, terminal, cut = simulator.step(GOOD)
    assert (obs["vector"][2], reward, terminal, cut) == (3, 1 + 2 + 3, False, False)
    assert simulator.step(GOOD)[1:] == (4 + 5 + 6, False, True)
    # An episode's own end stops the repeat, and is not mistaken for the limit.
    simulator = limit_and_repeat(scripted.scripted(length=4), limit=2, repeat=3).open()
    simulator.reset(0)
    simulator.step(GOOD)
    assert simulator.step(GOOD)[1:] == (4, True, True)
    with pytest.raises(JaxwmError, match="steps its simulators as one"):
        limit_and_repeat(scripted.scripted()._replace(batch=lambda count: None), limit=2)


def test_too_many_faults_end_it():
    with Pool(scripted.scripted(), 2, HostConfig(workers=1, max_faults=2)) as pool:
        for _ in range(2):
            pool.step(actions(RAISE, 2))
        with pytest.raises(TooManyFaults, match=r"(?s)raised 3 times; the limit is 2.*gripper"):
            pool.step(actions(RAISE, 2))
        assert "gripper" in pool.failure


def unmakable():
    raise OSError("no such robot")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"open": unmakable}, "(?s)scripted cannot be made.*no such robot"),
        ({"obs_space": {}}, "(?s)scripted cannot be made.*the space has"),
    ],
)
def test_what_cannot_be_made_is_told_at_once(change, words):
    with pytest.raises(JaxwmError, match=words):
        Pool(scripted.scripted()._replace(**change), 2, HostConfig(workers=1))


def test_each_simulator_gets_its_own_time_to_be_made(monkeypatch):
    def slow():
        time.sleep(0.5)
        return scripted.Scripted()

    monkeypatch.setattr(host, "_START_SECONDS", 5.0)
    env = scripted.scripted()._replace(open=slow)
    with Pool(env, 14, HostConfig(workers=1, timeout=1.0)) as pool:  # 7 s in all
        assert pool.reset().is_first.all() and not any(pool.faults.values())


def test_one_that_is_never_made_is_told(monkeypatch):
    monkeypatch.setattr(host, "_START_SECONDS", 3.0)
    env = scripted.scripted()._replace(open=lambda: time.sleep(99))
    with pytest.raises(JaxwmError, match=r"(?s)cannot be made; its process hung.*in <lambda>"):
        Pool(env, 2, HostConfig(workers=1, timeout=0.1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": -1}, "host.workers is -1"),
        ({"timeout": 0.0}, "host.timeout is 0.0 seconds"),
        ({"max_faults": -1}, "host.max_faults is -1"),
    ],
)
def test_bad_numbers_are_told(change, words):
    with pytest.raises(JaxwmError, match=words):
        HostConfig(**change)


class Counting:
    """Two counters that step as one, in the NEXT_STEP way."""

    def __init__(self, count: int):
        self._time = np.zeros(count, int)

    def reset(self, seed: int):
        self._time[:] = 0
        return {"vector": self._look()}

    def step(self, action):
        ended = self._time == 3
        self._time = np.where(ended, 0, self._time + 1)
        if (action == RAISE).any():
            raise RuntimeError("all of them")
        if (action == SHAPE).any():
            return {"vector": np.zeros((1, 3))}, ended * 0.0, ended, ended
        terminal = (self._time == 3) & (np.arange(len(ended)) == 0)
        cut = (self._time == 3) & ~terminal
        return {"vector": self._look()}, np.where(ended, 99.0, 1.0), terminal, cut

    def _look(self):
        return np.repeat(self._time[:, None], 3, 1).astype(float)

    def close(self):
        pass


def test_simulators_that_step_as_one():
    env: HostEnv = scripted.scripted()._replace(batch=Counting)
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        assert pool.reset().is_first.all()
        for _ in range(3):
            row = pool.step(actions(GOOD, 2))
        assert row.is_last.all() and row.is_terminal.tolist() == [True, False]
        row = pool.step(actions(GOOD, 2))
        assert row.is_first.all() and (row.reward == 0).all() and not row.is_last.any()
        pool.step(actions(GOOD, 2))
        for count, (action, kind) in enumerate([(RAISE, "raised"), (SHAPE, "bad shape or type")]):
            row = pool.step(actions(action, 2))
            assert row.is_first.all() and pool.faults[kind] == 1
            assert sum(pool.faults.values()) == count + 1
