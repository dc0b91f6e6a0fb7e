"""A world on a line, to test behaviours without a learned model.

A state is a position. An action moves it: a number by itself, a choice of two by -1 or +1. The
reward of a state is its position.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxwm import dists
from jaxwm.types import Discrete, Observed, Start, Step, WorldModel, as_dict

T, B = 3, 2


def world(action_space: Any, ends: bool = False, discount: float = 0.9) -> WorldModel:
    """The world as a model with the parameters {"push": how far actions move}.

    Args:
      action_space: of the action called "action", one number or a choice of two.
      ends: whether it predicts "continue", with the probability of `discount` everywhere.
      discount: that probability.
    """
    discrete = isinstance(as_dict(action_space)["action"], Discrete)

    def step(params, carry, action, draws):
        action = as_dict(action)["action"]
        move = action @ jnp.asarray([-1.0, 1.0]) if discrete else action[..., 0]
        place = carry + params["push"] * move + draws
        return place, place

    def predict(params, latents, keys=None):
        found = {"reward": dists.UnitNormal(latents, 0)}
        if ends:
            logit = jnp.log(discount / (1 - discount)) + 0 * latents
            found["continue"] = dists.SoftBernoulli(logit)
        return {key: x for key, x in found.items() if keys is None or key in keys}

    def starts(params, observed, key=None):
        if observed.carries is None:
            index = jnp.arange(B) + (T - 1) * B
            return Start(observed.carry, observed.latents[-1], index)
        flat = observed.carries.reshape(-1)
        return Start(flat, flat, jnp.arange(flat.size))

    return WorldModel(
        init=lambda key: {"push": jnp.ones(())},
        initial=lambda batch: jnp.zeros(batch),
        draws=lambda key, lead: jnp.zeros(lead),
        observe=lambda *args: None,
        starts=starts,
        step=step,
        features=lambda latents: jnp.stack([latents, jnp.ones_like(latents)], -1),
        predict=predict,
        loss=lambda *args: None,
        pack=lambda carry: (),
        unpack=lambda memo, batch: jnp.zeros(batch),
    )


def seen(stored: bool = True) -> Observed:
    """Positions 0, 0.1, ... of rows (T, B)."""
    places = jnp.arange(T * B).reshape(T, B) / 10
    return Observed(places[-1], places, places if stored else None)


def rows(action_space: Any, is_terminal: Any = None) -> Step:
    """Rows (T, B) of which only the ends matter."""
    no = jnp.zeros((T, B), bool)
    terminal = no if is_terminal is None else is_terminal
    action = jax.tree.map(lambda x: jnp.zeros((T, B, *x.shape), x.dtype), action_space)
    return Step(action, {}, jnp.zeros((T, B)), no, no, terminal)
