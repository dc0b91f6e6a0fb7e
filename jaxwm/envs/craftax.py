"""Craftax and Craftax-Classic: open worlds to survive in, written in JAX.

Classic is Crafter (17 actions, 10,000 steps at most); Craftax adds dungeons and a boss
(43 actions, 100,000 steps). Dying and beating the boss are true ends, the limit is a cut.

Symbolic names observe "vector". Pixel names observe "image", uint8: 255 times the package's
numbers, rounded, with black rows below and black columns to the right up to the next multiples
of 16, so that the encoder can halve it: 63x63 becomes 64x64, 130x110 becomes 144x112. The
package draws its textures the first time that a pixel environment is made, for about a minute.
"""

import contextlib
import dataclasses
import importlib.util
import io
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.types import Box, Discrete, Env, first, nearest, transition

NAMES = (
    "Craftax-Classic-Pixels-v1",
    "Craftax-Classic-Symbolic-v1",
    "Craftax-Pixels-v1",
    "Craftax-Symbolic-v1",
)
MULTIPLE = 16  # of the sides of images


def names() -> list[str]:
    """The environments of craftax, by its own names.

    Raises:
      ModuleNotFoundError: if craftax is not installed.
    """
    if importlib.util.find_spec("craftax") is None:
        raise ModuleNotFoundError("No module named 'craftax'", name="craftax")
    return list(NAMES)


def make(name: str, **options: Any) -> Env:
    """A craftax environment, without the package's own reset of ended episodes.

    Args:
      name: craftax's name.
      options: fields of the environment's parameters, such as `max_timesteps=1000`.

    Returns:
      A single environment.

    Raises:
      JaxwmError: if the name or an option is unknown.
    """
    if name not in NAMES:
        raise nearest(name, NAMES, "craftax environment")
    with _quiet():
        from craftax.craftax_env import make_craftax_env_from_name

        env = make_craftax_env_from_name(name, auto_reset=False)
    params: Any = env.default_params
    fields = {field.name for field in dataclasses.fields(params)}
    for option in options:
        if option not in fields:
            raise nearest(option, fields, f"option of craftax/{name}")
    return _adapt(f"craftax/{name}", env, params.replace(**options))


def _adapt(name: str, env: Any, params: Any) -> Env:
    """The `Env` of a craftax environment and its parameters."""
    action_space = Discrete(env.num_actions)
    shape = env.observation_space(params).shape
    endless = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)
    if len(shape) == 3:
        pad = [(0, -side % MULTIPLE) for side in shape[:2]] + [(0, 0)]
        space = Box((shape[0] + pad[0][1], shape[1] + pad[1][1], 3), "uint8", 0.0, 255.0)
    else:
        space = Box(shape)

    def look(obs):
        if len(shape) == 3:
            return {"image": jnp.pad(jnp.round(255 * obs).astype(jnp.uint8), pad)}
        return {"vector": obs.astype(jnp.float32)}

    # Raw key data: craftax uses some keys twice, which the key checker forbids.
    def reset(key):
        with jax.numpy_rank_promotion("allow"):
            obs, state = env.reset_env(jax.random.key_data(key), params)
        return state, first(action_space, look(obs))

    def step(state, action, key):
        with jax.numpy_rank_promotion("allow"):
            obs, state, reward, _, _ = env.step_env(jax.random.key_data(key), state, action, params)
            # The package's own flag does not tell the limit from a true end.
            terminal = env.is_terminal(state, endless)
        cut = state.timestep >= params.max_timesteps
        return state, transition(action, look(obs), reward, terminal, cut)

    return Env(name, {"image" if len(shape) == 3 else "vector": space}, action_space, reset, step)


@contextlib.contextmanager
def _quiet():
    """Without what craftax prints and its dependencies warn about when it is made."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
