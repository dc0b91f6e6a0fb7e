"""Random rows of any spaces, and parameters away from their start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.types import ActionSpace, Discrete, Key, ObsSpace, Params, Space, Step, as_dict


def values(space: Space, key: Key, lead: tuple[int, ...]) -> jax.Array:
    """Random values of a space."""
    shape = (*lead, *space.shape)
    if isinstance(space, Discrete):
        return jax.random.randint(key, shape, 0, jnp.broadcast_to(jnp.array(space.classes), shape))
    if space.dtype == "uint8":
        return jax.random.randint(key, shape, 0, 256).astype(jnp.uint8)
    return jax.random.normal(key, shape)


def two_episodes(
    obs_space: ObsSpace, action_space: ActionSpace, key: Key, length: int, batch: int, second: int
) -> Step:
    """Rows (T, B) of two episodes each; the rows do not start with a first row.

    Args:
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      key: determines observations, actions and rewards.
      length: rows T.
      batch: environments B.
      second: first row of the second episode.
    """
    lead = (length, batch)
    spaces = {f"obs/{name}": space for name, space in obs_space.items()}
    spaces |= {f"action/{name}": space for name, space in as_dict(action_space).items()}
    key_reward, *keys = jax.random.split(key, 1 + len(spaces))
    drawn = {name: values(x, k, lead) for (name, x), k in zip(spaces.items(), keys, strict=True)}
    action: Any = {name: drawn[f"action/{name}"] for name in as_dict(action_space)}
    flags = jnp.zeros(lead, bool)
    return Step(
        action if isinstance(action_space, dict) else action["action"],
        {name: drawn[f"obs/{name}"] for name in obs_space},
        jax.random.normal(key_reward, lead),
        flags.at[second].set(True),
        flags.at[second - 1].set(True),
        flags.at[second - 1, 0].set(True),
    )


def moved(params: Params, size: float = 0.1) -> Params:
    """Parameters away from initialisation, where some heads are zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    shifts = [size * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, [x + y for x, y in zip(leaves, shifts, strict=True)])
