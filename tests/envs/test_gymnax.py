"""The gymnax adapter against a plain loop over gymnax itself."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.envs import make
from jaxwm.envs.frames import CELL, COLORS, draw
from jaxwm.envs.wrappers import batch
from jaxwm.types import JaxwmError


def test_cartpole_equals_a_plain_loop_over_gymnax():
    count, steps, limit = 4, 300, 25
    env = batch(make("gymnax/CartPole-v1", max_steps_in_episode=limit), count)
    actions = np.random.default_rng(0).integers(0, 2, (steps, count))
    actions[:, 0] = np.arange(steps) % 2  # keeps the pole up for long: meets the limit

    @jax.jit
    def rollout(key):
        key_reset, key_steps = jax.random.split(key)
        state, row = env.reset(key_reset)
        keys = jax.random.split(key_steps, steps)
        rows = jax.lax.scan(lambda s, x: env.step(s, *x), state, (jnp.asarray(actions), keys))[1]
        return row, rows

    start, rows = jax.tree.map(np.asarray, rollout(jax.random.key(7)))

    raw, params = gymnax.make("CartPole-v1")
    step, reset = jax.jit(raw.step_env), jax.jit(raw.reset_env)
    with jax.debug_key_reuse(False):
        key_reset, key_steps = jax.random.split(jax.random.key(7))
        split = jax.jit(lambda key: tuple(jax.random.split(key)))
        fan = jax.jit(lambda key: jax.random.split(key, count))
        episodes = [reset(key, params) for key in fan(key_reset)]
        np.testing.assert_allclose(start.obs["vector"], [obs for obs, _ in episodes], atol=1e-6)
        states = [state for _, state in episodes]
        ended = [False] * count
        limits = terminals = 0
        for t, key in enumerate(jax.random.split(key_steps, steps)):
            key_step, key_again = split(key)
            keys_step, keys_again = fan(key_step), fan(key_again)
            for b in range(count):
                if ended[b]:
                    obs, states[b] = reset(keys_again[b], params)
                    want = (0.0, True, False, False, 0)
                else:
                    action = int(actions[t, b])
                    obs, states[b], reward, terminal, _ = step(
                        keys_step[b], states[b], action, params
                    )
                    cut = int(states[b].time) >= limit
                    terminals, limits = terminals + bool(terminal), limits + cut
                    last = bool(terminal) or cut
                    want = (float(reward), False, last, bool(terminal), action)
                ended[b] = want[2]
                got = (
                    rows.reward[t, b],
                    rows.is_first[t, b],
                    rows.is_last[t, b],
                    rows.is_terminal[t, b],
                    rows.action[t, b],
                )
                assert got == want, (t, b)
                np.testing.assert_allclose(rows.obs["vector"][t, b], obs, atol=1e-4)
    assert limits and terminals  # both kinds of end were met


def test_actions_are_scaled_and_the_limit_is_no_terminal():
    env = make("gymnax/Pendulum-v1", max_steps_in_episode=1)
    assert (env.action_space.low, env.action_space.high) == (-1.0, 1.0)
    raw, params = gymnax.make("Pendulum-v1")
    with jax.debug_key_reuse(False):
        key = jax.random.key(0)
        state, _ = env.reset(key)
        _, row = jax.jit(env.step)(state, jnp.array([0.5]), key)
        _, raw_state = raw.reset_env(key, params)
        obs, _, reward, _, _ = jax.jit(raw.step_env)(key, raw_state, jnp.array([1.0]), params)
    np.testing.assert_allclose(row.obs["vector"], obs, atol=1e-5)
    np.testing.assert_allclose(row.reward, reward, atol=1e-5)
    assert bool(row.is_last) and not bool(row.is_terminal)


def test_grids_become_pictures():
    grid = np.zeros((10, 10, 4), np.float32)
    grid[9, 4, 0] = 1
    grid[2, 3, 1] = grid[2, 3, 3] = 1
    image = np.asarray(draw(jnp.asarray(grid)))
    assert image.shape == (80, 80, 3)
    np.testing.assert_array_equal(image[9 * CELL, 4 * CELL], COLORS[0])
    # Two channels in one cell: the mean of (255, 220, 60) and (235, 85, 85), cut to integers.
    np.testing.assert_array_equal(image[3 * CELL - 1, 4 * CELL - 1], [245, 152, 72])
    np.testing.assert_array_equal(image[0, 0], [20, 20, 30])
    space = make("gymnax/Breakout-MinAtar:image").obs_space["image"]
    assert (space.shape, space.dtype) == ((80, 80, 3), "uint8")


def test_errors_name_the_way_out():
    with pytest.raises(JaxwmError, match=r"Did you mean .*Breakout-MinAtar"):
        make("gymnax/Breakout-Minatar")
    with pytest.raises(JaxwmError, match="left out because it downloads"):
        make("gymnax/MNISTBandit-bsuite")
    with pytest.raises(JaxwmError, match=r"CartPole-v1 observes .* cannot be drawn as an image"):
        make("gymnax/CartPole-v1", render=True)
    with pytest.raises(JaxwmError, match=r"option of gymnax/CartPole-v1 .*max_steps_in_episode"):
        make("gymnax/CartPole-v1", max_steps_in_episodes=3)
