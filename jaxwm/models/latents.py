"""The categorical latent: S groups of K classes, sampled with a straight-through gradient.

Source: DreamerV2 (arXiv:2010.02193) for the latent and the balanced KL, DreamerV3
(arXiv:2301.04104) for the mixture with the uniform distribution and the free nats.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import dists
from jaxwm.config import at_least, share
from jaxwm.types import Array, PyTree

sg = jax.lax.stop_gradient


class LatentSpace(NamedTuple):
    """A stochastic state as pure functions, flat (..., size) outside of them.

    Attributes:
      size: length of the flat state.
      outputs: numbers that a network gives to describe its distribution.
      draws: `key, lead -> draws` for states of shape `lead`.
      sample: `raw (..., outputs), draws -> state (..., size)`, with a gradient into `raw`.
      kl: `posterior raw, prior raw (T, B, outputs) -> {name: losses (T, B)}`.
      entropy: `raw -> (...)` in nats.
      pack: `state -> compact`, for storage.
      unpack: `compact -> state`.
    """

    size: int
    outputs: int
    draws: Callable[..., PyTree]
    sample: Callable[..., Array]
    kl: Callable[..., dict[str, Array]]
    entropy: Callable[[Array], Array]
    pack: Callable[[Array], PyTree]
    unpack: Callable[[PyTree], Array]


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Sizes and regularisation of the categorical latent.

    Args:
      stoch: number of groups S.
      classes: number of classes K of each group.
      unimix: share of the uniform distribution mixed into every group, in [0, 1].
      free_nats: KL below which neither side is trained, in nats per time step.
    """

    stoch: int = 32
    classes: int = 64
    unimix: float = 0.01
    free_nats: float = 1.0

    def __post_init__(self):
        at_least(self, 1, "stoch")
        at_least(self, 2, "classes")
        share(self, "unimix")
        at_least(self, 0, "free_nats")


def categorical(config: LatentConfig) -> LatentSpace:
    stoch, classes = config.stoch, config.classes

    def dist(raw):
        return dists.OneHot(raw.reshape(*raw.shape[:-1], stoch, classes), config.unimix)

    def draws(key, lead):
        return jax.random.uniform(key, (*lead, stoch))

    def sample(raw, draws):
        groups = dist(raw)
        uniform = draws.ndim == raw.ndim and draws.shape[-1] == stoch
        z = groups.sample_uniform(draws) if uniform else groups.sample_noise(draws)
        return z.reshape(raw.shape)

    def kl(post, prior):
        dyn = dist(sg(post)).kl_divergence(dist(prior))
        rep = dist(post).kl_divergence(dist(sg(prior)))
        return {
            "dyn": jnp.maximum(dyn, config.free_nats),
            "rep": jnp.maximum(rep, config.free_nats),
        }

    def pack(z):
        dtype = jnp.uint8 if classes <= 256 else jnp.int32
        return jnp.argmax(z.reshape(*z.shape[:-1], stoch, classes), -1).astype(dtype)

    def unpack(index):
        return jax.nn.one_hot(index, classes).reshape(*index.shape[:-1], -1)

    return LatentSpace(
        stoch * classes,
        stoch * classes,
        draws,
        sample,
        kl,
        lambda raw: dist(raw).entropy(),
        pack,
        unpack,
    )
