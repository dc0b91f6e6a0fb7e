"""Brax environments: robots in a rigid-body simulator written in JAX.

A name may end in the simulator's backend: "halfcheetah:positional"; "spring" is the fastest
and the default. Episodes are cut after 1000 steps, and falling over is a true end.
"""

import contextlib
import io
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.envs.wrappers import normalize_action, time_limit
from jaxwm.types import Box, Env, first, nearest, transition

BACKENDS = ("generalized", "mjx", "positional", "spring")
NAMES = (
    "ant",
    "fast",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "swimmer",
    "walker2d",
)


def names() -> list[str]:
    """The environments of brax (listed here, since importing brax takes seconds)."""
    return list(NAMES)


def make(name: str, limit: int = 1000, **options: Any) -> Env:
    """A brax environment.

    Args:
      name: brax's name, with ":backend" or without.
      limit: steps after which an episode is cut.
      options: arguments of the environment's constructor.

    Returns:
      A single environment; its observation is "vector", its actions lie in [-1, 1].

    Raises:
      JaxwmError: if the name or the backend is unknown.
    """
    base, colon, backend = name.partition(":")
    if base not in NAMES:
        raise nearest(base, NAMES, "brax environment")
    backend = backend if colon else "spring"
    if backend not in BACKENDS:
        raise nearest(backend, BACKENDS, "brax backend")
    with _quiet():
        import brax.envs

        env = brax.envs.get_environment(base, backend=backend, **options)
        env = _adapt(f"brax/{name}", env)
    return time_limit(normalize_action(env), limit)


def _adapt(name: str, env: Any) -> Env:
    """The `Env` of a brax environment."""
    action_space = Box((env.action_size,), "float32", -1.0, 1.0)
    start = jax.eval_shape(env.reset, jax.random.key(0))
    zero = jnp.zeros(action_space.shape)
    with jax.numpy_rank_promotion("allow"):
        like = jax.eval_shape(lambda state: env.step(state, zero), start)

    def settle(state):
        return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, like)

    def reset(key):
        with jax.numpy_rank_promotion("allow"), _quiet():
            state = env.reset(key)
        return settle(state), first(action_space, {"vector": state.obs})

    def step(state, action, key):
        del key  # the simulation is deterministic
        with jax.numpy_rank_promotion("allow"), _quiet():
            state = env.step(state, action)
        row = transition(action, {"vector": state.obs}, state.reward, state.done > 0)
        return settle(state), row

    return Env(name, {"vector": Box(start.obs.shape)}, action_space, reset, step)


@contextlib.contextmanager
def _quiet():
    """Without what brax and its dependencies print and warn about when imported or traced."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
