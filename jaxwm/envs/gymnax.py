"""Gymnax environments: classic control, bsuite, MinAtar and others, written in JAX.

The adapter steps the environment without gymnax's own automatic reset, so that terminal rows
are kept and a time limit is told from a true end. Floating-point arrays of any rank up to 3
are the observation "vector" (encoders flatten it), a single integer is "index", and the
MinAtar grids can be drawn as the observation "image".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.envs.frames import draw_grid
from jaxwm.envs.wrappers import normalize_action
from jaxwm.types import Box, Discrete, Env, JaxwmError, Space, first, nearest, transition, zeros

# Constructing it downloads a data set.
EXCLUDED = {"MNISTBandit-bsuite": "it downloads the MNIST images when it is made"}


def names() -> list[str]:
    """The environments of the installed gymnax, those with images also as `name:image`."""
    import gymnax

    known = [name for name in gymnax.registered_envs if name not in EXCLUDED]
    return known + [f"{name}:image" for name in known if name.endswith("-MinAtar")]


def make(name: str, render: bool = False, **options: Any) -> Env:
    """A gymnax environment.

    Args:
      name: gymnax's name; with the suffix ":image" as with `render`.
      render: draw MinAtar grids as 80x80x3 uint8 images, one colour per channel.
      options: fields of the environment's parameters (`max_steps_in_episode=200`), else
        arguments of its constructor.

    Returns:
      A single environment with actions in [-1, 1].

    Raises:
      JaxwmError: if the name or an option is unknown, or the environment cannot be used.
    """
    import gymnax

    base, _, suffix = name.partition(":")
    if base in EXCLUDED:
        raise JaxwmError(f"gymnax/{base} is left out because {EXCLUDED[base]}. Choose another.")
    if base not in gymnax.registered_envs or suffix not in ("", "image"):
        raise nearest(name, names(), "gymnax environment")
    render = render or suffix == "image"

    fields = {field.name for field in dataclasses.fields(gymnax.make(base)[1])}
    changes = {key: value for key, value in options.items() if key in fields}
    rest = {key: value for key, value in options.items() if key not in fields}
    with jax.numpy_rank_promotion("allow"):
        try:
            env, params = gymnax.make(base, **rest)
        except TypeError as error:
            raise nearest(", ".join(rest), fields, f"option of gymnax/{base}") from error
        env = _adapt(f"gymnax/{name}", env, params.replace(**changes))
    if render:
        env = draw_grid(env, next(iter(env.obs_space)))
    return normalize_action(env)


def _adapt(name: str, env: Any, params: Any) -> Env:
    """The `Env` of a gymnax environment and its parameters."""
    action_space = _space(env.action_space(params))
    key, zero = jax.random.key(0), zeros(action_space)
    obs, state = jax.eval_shape(lambda key: env.reset_env(key, params), key)
    like = jax.eval_shape(lambda key, state: env.step_env(key, state, zero, params)[1], key, state)
    key_obs, space = _obs_space(name, env.observation_space(params), obs)

    def look(obs):
        return {key_obs: jnp.asarray(obs, space.dtype)}

    def settle(state):
        # Some resets hold Python numbers or integers where steps give floats.
        return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, like)

    def reset(key):
        with jax.numpy_rank_promotion("allow"):
            obs, state = env.reset_env(key, params)
            return settle(state), first(action_space, look(obs))

    def step(state, action, key):
        with jax.numpy_rank_promotion("allow"):
            obs, state, reward, terminal, _ = env.step_env(key, state, action, params)
            cut = env.is_truncated(state, params)
            return settle(state), transition(action, look(obs), reward, terminal, cut)

    return Env(name, {key_obs: space}, action_space, reset, step)


def _obs_space(name: str, space: Any, obs: Any) -> tuple[str, Space]:
    """The key and space of the one observation, by the array that really comes."""
    if hasattr(space, "n"):
        return "index", Discrete(int(space.n))
    if not hasattr(obs, "shape") or len(obs.shape) > 3:
        raise JaxwmError(f"{name} observes {obs}, but one array of rank 3 or less is expected.")
    return "vector", dataclasses.replace(_space(space), shape=obs.shape, dtype="float32")


def _space(space: Any) -> Space:
    """The space of a gymnax space of numbers."""
    if hasattr(space, "n"):
        return Discrete(int(space.n))

    def bound(value):
        # gymnax writes the largest float where it means no bound.
        value = np.asarray(value, np.float64)
        value = np.where(np.abs(value) > 1e38, np.copysign(np.inf, value), value)
        flat = np.unique(value)
        if flat.size == 1:
            return float(flat[0])
        return tuple(np.broadcast_to(value, space.shape).ravel().tolist())

    return Box(tuple(space.shape), "float32", bound(space.low), bound(space.high))
