"""Noise on chosen actions, for exploration.

Actions are numbers in [-1, 1] or one-hot vectors over K classes; random draws are arguments.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwm.numerics import Scalar
from jaxwm.types import ActionSpace, Discrete, Key, as_dict


def add_normal(
    action: Float[Array, "*lead"], normal: Float[Array, "*lead"], amount: Scalar = 0.3
) -> Float[Array, "*lead"]:
    """Adds normal noise of standard deviation `amount`, and clips to [-1, 1].

    Source: PlaNet (arXiv:1811.04551), Dreamer (arXiv:1912.01603).
    """
    return jnp.clip(action + amount * normal, -1, 1)


def epsilon_greedy(
    action: Float[Array, "*lead K"],
    uniform: Float[Array, "*lead"],
    gumbel: Float[Array, "*lead K"],
    epsilon: Scalar,
) -> Float[Array, "*lead K"]:
    """Replaces a choice by a random one with probability `epsilon`.

    Args:
      action: one-hot choices.
      uniform: draws in [0, 1) that decide whether.
      gumbel: draws that decide for which class: minus infinity keeps one out.
      epsilon: the probability, in [0, 1].

    Source: Dreamer (arXiv:1912.01603) and its code.
    """
    other = jax.nn.one_hot(jnp.argmax(gumbel, -1), action.shape[-1])
    return jnp.where(uniform[..., None] < epsilon, other, action)


def mix_uniform(
    action: Float[Array, "*lead K"], gumbel: Float[Array, "*lead K"], epsilon: Scalar
) -> Float[Array, "*lead K"]:
    """Draws a choice from `epsilon / K + (1 - epsilon) * action`, by one draw per class.

    Args:
      action: one-hot choices.
      gumbel: draws for the classes: minus infinity keeps one out.
      epsilon: share of the uniform distribution, in [0, 1].

    Source: DreamerV2 (arXiv:2010.02193) and its code.
    """
    probs = epsilon / action.shape[-1] + (1 - epsilon) * action
    return jax.nn.one_hot(jnp.argmax(jnp.log(probs) + gumbel, -1), action.shape[-1])


def draws(
    action_space: ActionSpace, key: Key, lead: tuple[int, ...], gate: bool = False
) -> dict[str, Any]:
    """Random draws for `noisy`.

    Args:
      action_space: one space, or a space per key.
      key: where they come from.
      lead: shape of the batch of actions.
      gate: whether choices are replaced by `epsilon_greedy` instead of `mix_uniform`.

    Returns:
      For every action key normal draws, Gumbel draws, or (uniform, Gumbel draws).
    """
    found: dict[str, Any] = {}
    for index, (name, space) in enumerate(sorted(as_dict(action_space).items())):
        key_which, key_whether = jax.random.split(jax.random.fold_in(key, index))
        shape = (*lead, *space.shape)
        if not isinstance(space, Discrete):
            found[name] = jax.random.normal(key_which, shape)
            continue
        gumbel = jax.random.gumbel(key_which, (*shape, space.width))
        found[name] = (jax.random.uniform(key_whether, shape), gumbel) if gate else gumbel
    return found


def noisy(
    action_space: ActionSpace,
    action: Mapping[str, Array],
    draws: Mapping[str, Any],
    amount: Scalar,
) -> dict[str, Array]:
    """Actions with noise.

    Args:
      action_space: one space, or a space per key.
      action: numbers or one-hot choices of every key.
      draws: see `draws`.
      amount: standard deviation for numbers, and probability of a random choice; 0 for no noise.
    """
    spaces, found = as_dict(action_space), {}
    for name, x in action.items():
        space, draw = spaces[name], draws[name]
        if not isinstance(space, Discrete):
            found[name] = add_normal(x, draw, amount)
            continue
        uniform, gumbel = draw if isinstance(draw, tuple) else (None, draw)
        if (mask := space.mask()) is not None:
            gumbel = jnp.where(jnp.broadcast_to(mask, gumbel.shape), gumbel, -jnp.inf)
        if uniform is None:
            found[name] = mix_uniform(x, gumbel, amount)
        else:
            found[name] = epsilon_greedy(x, uniform, gumbel, amount)
    return found
