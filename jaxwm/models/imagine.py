"""Dreams: a policy acts in a world model, for every model alike.

    a_i             ~ policy(features(s_i))
    carry, s_{i+1}  = step(carry, a_i)            i = 0..H-1

Nothing in a dream sends gradients into the model's parameters; see `dreamer`.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxwm.types import Action, Array, Dreamer, Imagined, Key, Params, PyTree, Start, WorldModel

sg = jax.lax.stop_gradient


def dreamer(model: WorldModel, params: Params) -> Dreamer:
    """The model with fixed parameters.

    Gradients flow through latents and actions, but not into `params` or the states that dreams
    start from.

    Args:
      model: the world model.
      params: its parameters.
    """
    fixed = sg(params)

    def starts(observed: Any, key: Key | None = None) -> Start:
        return sg(model.starts(fixed, observed, key))

    def step(carry: PyTree, action: Action, draws: PyTree) -> tuple[PyTree, PyTree]:
        return model.step(fixed, carry, action, draws)

    def predict(latents: PyTree, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
        return model.predict(fixed, latents, keys)

    def dream(start: Start, policy: Callable[..., Action], draws: tuple[PyTree, Any]) -> Imagined:
        return imagine(step, model.features, start, policy, draws)

    return Dreamer(model.draws, starts, step, dream, model.features, predict)


def imagine(
    advance: Callable[[PyTree, Action, PyTree], tuple[PyTree, PyTree]],
    features: Callable[[PyTree], Array],
    start: Start,
    policy: Callable[[Array, Any], Action],
    draws: tuple[PyTree, Any],
) -> Imagined:
    """Dreams of H steps, all at once.

    Args:
      advance: `carry, action, draws -> carry, latent`, one dreamed step.
      features: `latent -> (N, F)`, what the policy reads.
      start: the N states that dreams begin at.
      policy: `features (N, F), policy draws (N, ...) -> action (N, ...)`.
      draws: draws of the model and of the policy, each (H, N, ...).

    Returns:
      The dreams. Gradients flow as `policy` and `advance` let them.
    """

    def step(state: tuple[PyTree, PyTree], draws: Any) -> tuple[Any, tuple[PyTree, Action]]:
        (carry, latent), (model_draws, policy_draws) = state, draws
        action = policy(features(latent), policy_draws)
        return advance(carry, action, model_draws), (latent, action)

    (_, last), (latents, actions) = jax.lax.scan(step, (start.carry, start.latent), draws)
    return Imagined(latents, actions, last)
