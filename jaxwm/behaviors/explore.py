"""Noise on chosen actions, for exploration.

Actions are numbers in [-1, 1] or one-hot vectors over K classes; random draws are arguments.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwm.numerics import Scalar


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
