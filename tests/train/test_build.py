"""What a program is made of, and settings of which none can be made."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted

from jaxwm import envs, train
from jaxwm.replay import device as replay
from jaxwm.types import Box, Env, JaxwmError, first, transition
from tests.train.fake import FakeConfig, newest, run_config


@pytest.mark.parametrize("option", ["jax_enable_x64", "jax_debug_nans"])
def test_options_of_jax_under_which_nothing_runs_are_refused(option):
    jax.config.update(option, True)
    try:
        with pytest.raises(ValueError, match=f"Unset (it|{option.upper()})"):
            train.build(run_config())
    finally:
        jax.config.update(option, False)


def test_an_environment_by_another_name_is_refused():
    with pytest.raises(ValueError, match="Did you mean Memory"):
        train.make_env(run_config("toy/Memori"))
    assert train.make_env(run_config("toy/Memory")).name == envs.make("toy/Memory").name


def test_boxes_of_any_bounds_are_taken_in_minus_one_to_one(monkeypatch):
    def make(low, high):
        space = Box((2,), low=low, high=high)
        env = Env(
            "test/Echo",
            {"seen": Box((2,))},
            space,
            lambda key: ((), first(space, {"seen": jnp.zeros(2)})),
            lambda state, action, key: ((), transition(action, {"seen": action}, 0.0, False)),
        )
        monkeypatch.setattr(envs, "make", lambda name: env)
        return train.make_env(run_config(env.name))

    for low, high, seen in [(-10.0, 10.0, (5.0, 10.0)), (-1.0, 1.0, (0.5, 1.0))]:
        env = make(low, high)
        assert env.action_space == Box((2,), "float32", -1.0, 1.0)
        _, row = env.step((), jnp.array([0.5, 1.5]), jax.random.key(0))
        np.testing.assert_allclose(row.obs["seen"], seen)
        np.testing.assert_array_equal(row.action, [0.5, 1.5])
    # Without bounds the environment sees what was drawn.
    assert make(-math.inf, math.inf).action_space == Box((2,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": 0}, "shards is 0; it must be at least 1"),
        ({"shards": 3}, "envs is 4, which cannot be divided into 3 equal shards"),
        ({"shards": 4}, "replay.batch_size is 2, which cannot be divided into 4"),
        ({"shard_params": True}, "there is one shard. Raise --shards"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        run_config(**changes)


def test_simulators_on_the_host_are_not_divided():
    with pytest.raises(ValueError, match="Only what runs on the device can be divided"):
        train.build(run_config(shards=2), single=scripted.chain())


def test_a_replay_that_cannot_lie_in_host_memory_is_refused(monkeypatch):
    config = run_config(place="host")
    with pytest.raises(JaxwmError, match=r"needs simulators on the host, and chain runs on the de"):
        train.build(config, single=scripted.device_chain())
    # The host's memory counts, not the device's.
    monkeypatch.setattr(replay, "_host_bytes", lambda: 1000)
    with pytest.raises(JaxwmError, match=r"this host has 0.0 GiB. Lower --replay.capacity"):
        train.build(config, single=scripted.chain())


def test_a_replay_of_newest_rows_must_fit_the_run():
    program = train.build(newest(length=5))
    assert program.replay.data == "newest"
    assert program.replay.shapes.rows.reward.shape == (4, 6)
    assert program.rhythm.first_update == 6
    with pytest.raises(
        JaxwmError, match=r"batch_size is 4, but .* Set batch_size to 8, the number"
    ):
        train.build(newest(envs=8, batch_size=4))
    # The numbers are those of the run, not of a shard.
    with pytest.raises(
        JaxwmError, match=r"batch_size is 4, but .* of all 8 env.* Set batch_size to 8"
    ):
        train.build(newest(envs=8, batch_size=4, shards=2))


def test_too_large_an_account_is_refused():
    config = run_config(train_every=2**31 - 1, train_ratio=999.999)
    with pytest.raises(JaxwmError, match="its train_every 2147483647; with 4 environments"):
        train.build(config)


def test_memos_of_any_form_have_their_ring():
    shapes = train.build(run_config()).replay.shapes
    assert {k: (x.shape, x.dtype) for k, x in shapes.memo.items()} == {
        "count": ((4, 100), np.float32),
        "seen": ((4, 100, 2), np.float32),
    }
    assert train.build(run_config(agent=FakeConfig(memos=False))).replay.shapes.memo == ()


def test_a_sweep_gives_each_member_its_own_agent():
    config = run_config(sweep=("rate=0.25,0.5",), seeds=2)
    assert config.members == 4
    program = train.build(config)
    key = jax.random.key(0)
    updates = [
        jax.make_jaxpr(program.agent_of(values).init)(key)
        for values in ({}, {"agent.rate": jnp.float32(0.25)})
    ]
    assert str(updates[0]) == str(updates[1])
    with pytest.raises(JaxwmError, match="noise"):
        dataclasses.replace(config, sweep=("noises=1,2",))
