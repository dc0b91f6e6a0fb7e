"""The brax adapter: limits and falls told apart, and the names it knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.envs import brax, make, validate
from jaxwm.types import Box, JaxwmError


def test_the_pendulum_is_cut_at_its_limit_and_falls_for_good(capfd):
    env = make("brax/inverted_pendulum", limit=3)
    assert env.obs_space == {"vector": Box((4,))}
    assert env.action_space == Box((1,), "float32", -1.0, 1.0)
    validate(env)

    @jax.jit
    def rollout(key):
        state, _ = env.reset(key)
        push = jnp.concatenate([jnp.zeros((3, 1)), jnp.ones((12, 1))])

        # The simulation takes no randomness after its reset: one key serves all steps.
        def step(state, action):
            return env.step(state, action, jax.random.key(0))

        return jax.lax.scan(step, state, push)[1]

    rows = rollout(jax.random.key(0))
    np.testing.assert_array_equal(rows.is_last[:3], [False, False, True])
    assert not rows.is_terminal[:3].any()  # nearly upright after three idle steps
    fallen = np.abs(rows.obs["vector"][:, 1]) > 0.2  # the pole's angle in radians
    np.testing.assert_array_equal(rows.is_terminal, fallen)
    assert fallen.any()
    assert capfd.readouterr().out == ""


def test_unknown_names_and_backends():
    with pytest.raises(JaxwmError, match=r"Did you mean .*halfcheetah"):
        make("brax/half_cheetah")
    with pytest.raises(JaxwmError, match=r"brax backend called 'springs'. Did you mean spring"):
        make("brax/ant:springs")


def test_the_listed_names_are_those_of_the_package():
    import brax.envs as package

    assert set(brax.names()) == set(package._envs)
