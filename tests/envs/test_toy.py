"""Toys: no action sequence beats the stated optimum, and a policy that looks attains it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.envs import toy
from jaxwm.envs.wrappers import batch

CELLS = toy.CELL


def catch(start, obs, elapsed):
    # The ball is the reddest thing in its row, the paddle the greenest at the bottom.
    image = obs["image"].astype(jnp.int32)
    ball = jnp.argmax(
        jax.lax.dynamic_index_in_dim(image, elapsed * CELLS + 3, 0, False)[3::CELLS, 0]
    )
    paddle = jnp.argmax(image[62, 3::CELLS, 1])
    return 1 + jnp.sign(ball - paddle)


def straight(start, obs, elapsed):
    gap = obs["target"] - obs["position"]
    return gap / jnp.maximum(jnp.linalg.norm(gap), 0.25)


def trusting(start, obs, elapsed):
    picture = obs["image"][0, -1, 0] > 128
    return jnp.where(obs["trust"] == 0, picture, obs["vector"][0] > 0).astype(jnp.int32)


# What to do at a row: the episode's first observation, the row's, and the steps so far.
POLICIES = {
    "Prediction": lambda start, obs, elapsed: jnp.zeros((), jnp.int32),
    "Discount": lambda start, obs, elapsed: jnp.zeros((), jnp.int32),
    "Observe": lambda start, obs, elapsed: obs["bit"],
    "Memory": lambda start, obs, elapsed: start["cue"] - 1,
    "Credit": lambda start, obs, elapsed: jnp.ones((), jnp.int32),
    "Reach": straight,
    "Pixels": catch,
    "Dials": lambda start, obs, elapsed: obs,
    "Mixed": trusting,
}


@pytest.mark.parametrize("name", toy.names())
def test_a_policy_attains_the_optimum(name):
    length, count = len(toy.REWARDS[f"toy/{name}"]), 8
    env = batch(toy.make(name), count)

    @jax.jit
    def rollout(key):
        key_reset, key_steps = jax.random.split(key)
        state, row = env.reset(key_reset)
        start = row.obs

        def step(carry, x):
            state, obs = carry
            elapsed, key = x
            action = jax.vmap(POLICIES[name], (0, 0, None))(start, obs, elapsed)
            state, row = env.step(state, action, key)
            return (state, row.obs), (row.reward, row.is_terminal)

        steps = (jnp.arange(length), jax.random.split(key_steps, length))
        return jax.lax.scan(step, (state, row.obs), steps)[1]

    reward, terminal = rollout(jax.random.key(3))
    expected = np.asarray(toy.REWARDS[f"toy/{name}"])
    np.testing.assert_allclose(reward, np.tile(expected[:, None], (1, count)), atol=1e-5)
    np.testing.assert_array_equal(terminal[:, 0], [False] * (length - 1) + [True])
    assert toy.OPTIMUM[f"toy/{name}"] == pytest.approx(expected.sum())


@pytest.mark.parametrize(
    "name", ["Prediction", "Discount", "Observe", "Memory", "Credit", "Pixels", "Mixed"]
)
def test_no_action_sequence_beats_the_optimum(name):
    env = toy.make(name)
    length = len(toy.REWARDS[env.name])
    sequences = np.array(list(itertools.product(range(env.action_space.classes), repeat=length)))

    @jax.jit
    def returns(key):
        key_reset, key_steps = jax.random.split(key)
        keys = jax.random.split(key_steps, length)

        def one(actions):
            state, _ = env.reset(key_reset)
            rows = jax.lax.scan(lambda s, x: env.step(s, *x), state, (actions, keys))[1]
            return rows.reward.sum()

        return jax.vmap(one)(sequences)

    with jax.debug_key_reuse(False):
        for seed in range(3):
            total = returns(jax.random.key(seed))
            assert float(total.max()) == pytest.approx(toy.OPTIMUM[env.name])
            assert name in ("Prediction", "Discount") or float(total.min()) < total.max()


def test_discounted_values():
    # Four steps with reward 1 left at 0.5: 1 + 1/2 + 1/4 + 1/8; three steps before a 1: 0.5^3.
    assert toy.optimal_value("toy/Prediction", 4, 0.5) == pytest.approx(1.875)
    assert toy.optimal_value("toy/Memory", 0, 0.5) == pytest.approx(0.125)
    assert toy.optimal_value("toy/Credit", 6, 0.9) == 0.0


def test_the_cue_is_shown_once_and_asked_for_at_the_end():
    env = toy.memory(delay=2)
    state, row = env.reset(jax.random.key(0))
    cues = [int(row.obs["cue"])]
    for key in jax.random.split(jax.random.key(1), 3):
        state, row = env.step(state, jnp.zeros((), jnp.int32), key)
        cues.append(int(row.obs["cue"]))
    assert cues[0] in (1, 2) and cues[1:] == [0, 3, 0]
    assert abs(float(row.reward)) == 1.0 and bool(row.is_terminal)
