"""The categorical latent: S groups of K classes, sampled with a straight-through gradient.

Source: DreamerV2 (arXiv:2010.02193) for the latent and the balanced KL, DreamerV3
(arXiv:2301.04104) for the mixture with the uniform distribution and the free nats.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxwm import dists, nets
from jaxwm.config import at_least, share
from jaxwm.types import Array, Float, Key

sg = jax.lax.stop_gradient


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


def distribution(config: LatentConfig, logits: Float[Array, "*lead S K"]) -> dists.OneHot:
    """The groups' distribution, one event of shape (S, K)."""
    return dists.OneHot(logits, config.unimix)


def noise(config: LatentConfig, key: Key, lead: tuple[int, ...]) -> Array:
    """What sampling latents of leading axes `lead` consumes, for `sample` to take step by step.

    Standard Gumbel draws (*lead, S, K); on a CPU, if there are many for each step, the steps' keys
    (lead[0],): drawn where they are used, they stay in the cache.
    """
    keys = jax.random.split(key, lead[0])
    # A draw passes through memory several times, and so is worth slicing at a quarter of the size.
    if nets.sliced(4 * math.prod(lead[1:]) * config.stoch * config.classes):
        return keys
    return jax.vmap(lambda key: _gumbel(config, key, lead[1:]))(keys)


def sample(config: LatentConfig, logits: Float[Array, "*lead S K"], noise: Array) -> Array:
    """Latents (*lead, S, K) of one step, one-hot, from that step's `noise`."""
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        noise = _gumbel(config, noise, logits.shape[:-2])
    return distribution(config, logits).sample_noise(noise)


def _gumbel(config: LatentConfig, key: Key, lead: tuple[int, ...]) -> Float[Array, "*lead S K"]:
    return jax.random.gumbel(key, (*lead, config.stoch, config.classes))


def kl_losses(
    config: LatentConfig, post: Float[Array, "*lead S K"], prior: Float[Array, "*lead S K"]
) -> tuple[Float[Array, "*lead"], Float[Array, "*lead"]]:
    """The two sides of the balanced KL, in nats per time step, clipped below.

    dyn = max(free, KL(sg(post) || prior)) trains the prior towards the posterior,
    rep = max(free, KL(post || sg(prior))) the posterior towards the prior.

    Args:
      config: gives the unimix share and the free nats.
      post: raw logits of the posterior.
      prior: raw logits of the prior.

    Returns:
      dyn and rep. Clipped entries have no gradient.
    """
    dyn = distribution(config, sg(post)).kl_divergence(distribution(config, prior))
    rep = distribution(config, post).kl_divergence(distribution(config, sg(prior)))
    return jnp.maximum(dyn, config.free_nats), jnp.maximum(rep, config.free_nats)
