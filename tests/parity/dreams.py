"""What checks of imagined actor-critics share. Recorded dream n is b * T + t, ours t * B + b."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.models.imagine import dreamer
from jaxwm.models.rssm import Carry
from jaxwm.types import Dreamer, Observed
from tests.parity.world import World, time_major


def our_rows(x: Any, batch: int) -> Any:
    """Recorded dreams (H, B * T, ...) in the order of ours."""
    x = jnp.asarray(x)
    x = jnp.swapaxes(x.reshape(x.shape[0], batch, -1, *x.shape[2:]), 1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def their_rows(x: Any, batch: int) -> Any:
    """Our dreams (H, T * B, ...) in the order of the recorded ones."""
    x = jnp.asarray(x)
    x = jnp.swapaxes(x.reshape(x.shape[0], -1, batch, *x.shape[2:]), 1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def observed(case: World, stoch: str) -> Observed:
    """The recorded latents of a batch, of which `stoch` is the name of the sampled part."""
    deter = time_major(case.recorded["out/rssm/deter"])
    sampled = time_major(case.recorded[stoch]).astype(jnp.float32)
    sampled = sampled.reshape(*deter.shape[:2], -1)
    last = Carry(deter[-1], sampled[-1])
    return Observed(last, jnp.concatenate([sampled, deter], -1), Carry(deter, sampled))


def shifted(case: World, params: Any, shift: Any, without: tuple[str, ...] = ()) -> Dreamer:
    """The recorded world model to dream in, where actions come out a bit different.

    The gradient of a loss with respect to the shift is its total derivative with respect to the
    actions of a dream.

    Args:
      case: the batch.
      params: of the world model.
      shift: added to the actions (H, N, A).
      without: predictions that the model should not have.
    """
    real = dreamer(case.model, params)

    def imagine(start: Any, policy: Callable[..., Any], draws: Any) -> Any:
        model_draws, action_draws = draws

        def moved(feat: Any, draws: Any) -> Any:
            action = policy(feat, draws[0])
            return {name: x + draws[1].reshape(x.shape) for name, x in action.items()}

        return real.imagine(start, moved, (model_draws, (action_draws, shift)))

    def predict(latents: Any, keys: Any = None) -> Any:
        found = real.predict(latents, keys)
        return {key: dist for key, dist in found.items() if key not in without}

    return real._replace(imagine=imagine, predict=predict)


def whole(dreams: Any) -> Any:
    """All states of dreams, the last ones included."""
    join = lambda x, end: jnp.concatenate([x, end[None]])  # noqa: E731
    return jax.tree.map(join, dreams.latents, dreams.last)
