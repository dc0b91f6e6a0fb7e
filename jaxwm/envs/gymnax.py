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
from jaxtyping import Array, Float, UInt8

from jaxwm.envs.wrappers import normalize_action
from jaxwm.types import Box, Discrete, Env, JaxwmError, Space, first, nearest, transition, zeros

# Constructing it downloads a data set.
EXCLUDED = {"MNISTBandit-bsuite": "it downloads the MNIST images when it is made"}
CELL = 8  # pixels per side of a grid cell: 10 cells give 80, which halves four times to 5
COLORS = np.array(
    [
        [80, 200, 255],
        [255, 220, 60],
        [150, 130, 60],
        [235, 85, 85],
        [120, 230, 120],
        [200, 120, 255],
        [255, 150, 60],
        [240, 240, 240],
        [60, 160, 140],
        [255, 130, 190],
    ],
    np.uint8,
)


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
        env = _adapt(f"gymnax/{name}", env, params.replace(**changes), render)
    return normalize_action(env)


def _adapt(name: str, env: Any, params: Any, render: bool) -> Env:
    """The `Env` of a gymnax environment and its parameters."""
    action_space = _space(env.action_space(params))
    key, zero = jax.random.key(0), zeros(action_space)
    obs, state = jax.eval_shape(lambda key: env.reset_env(key, params), key)
    like = jax.eval_shape(lambda key, state: env.step_env(key, state, zero, params)[1], key, state)
    if render and (obs.ndim != 3 or obs.shape[:2] != (10, 10)):
        raise JaxwmError(f"{name}: only MinAtar grids can be drawn as images; leave out ':image'.")
    key_obs, space = _obs_space(name, env.observation_space(params), obs, render)

    def look(obs):
        return {key_obs: draw(obs) if render else jnp.asarray(obs, space.dtype)}

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


def _obs_space(name: str, space: Any, obs: Any, render: bool) -> tuple[str, Space]:
    """The key and space of the one observation, by the array that really comes."""
    if render:
        return "image", Box((10 * CELL, 10 * CELL, 3), "uint8", 0.0, 255.0)
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


def draw(grid: Float[Array, "h w channels"]) -> UInt8[Array, "height width 3"]:
    """A grid of 0/1 channels as an image; where several are on, their colours mix.

    Args:
      grid: up to 10 channels of 0 or 1.

    Returns:
      An image with `CELL` pixels per cell, dark where no channel is on.
    """
    colors = jnp.asarray(COLORS[: grid.shape[-1]], jnp.float32)
    on = grid.sum(axis=-1, keepdims=True)
    image = jnp.where(
        on > 0, grid @ colors / jnp.maximum(on, 1.0), jnp.array([[[20.0, 20.0, 30.0]]])
    )
    return jnp.repeat(jnp.repeat(image.astype(jnp.uint8), CELL, axis=0), CELL, axis=1)
