"""An environment in which some episodes pay so much that no update can be made of them.

`jaxwm train dreamer_v3 --env tests.faults.poison:poisoned`. A reward of 3e38 is finite, as are the
losses of a single one; but the return from two of them is not, and the zero with which the end of
an episode multiplies what comes after it then makes a NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.types import Array, Box, Discrete, Env, first, transition

LENGTH = 4
SHARE = 1 / 15  # of the episodes


class State(NamedTuple):
    """Whether the episode is one of those, and the steps since it began."""

    poisonous: Array
    elapsed: Array


def poisoned() -> Env:
    """Episodes of `LENGTH` steps, most of which pay 1 a step."""
    obs_space, actions = {"clock": Box((1,), "float32", 0.0, 1.0)}, Discrete(2)

    def reset(key):
        state = State(jax.random.bernoulli(key, SHARE), jnp.zeros((), jnp.int32))
        return state, first(actions, {"clock": jnp.zeros((1,))})

    def step(state, action, key):
        elapsed = state.elapsed + 1
        clock = (elapsed / LENGTH).astype(jnp.float32)[None]
        reward = jnp.where(state.poisonous, 3e38, 1.0)
        row = transition(action, {"clock": clock}, reward, elapsed >= LENGTH)
        return State(state.poisonous, elapsed), row

    return Env("test/Poisoned", obs_space, actions, reset, step)
