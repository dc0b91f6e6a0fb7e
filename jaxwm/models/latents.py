"""The categorical latent: S groups of K classes, sampled with a straight-through gradient.

Source: DreamerV2 (arXiv:2010.02193) for the latent and the balanced KL, DreamerV3
(arXiv:2301.04104) for the mixture with the uniform distribution and the free nats.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxwm import dists, threefry
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


def noise(config: LatentConfig, key: Key, lead: tuple[int, ...]) -> Float[Array, "*lead S"]:
    """Draws from [0, 1) for latents of leading axes `lead`, one for each group."""
    return threefry.uniform(key, (*lead, config.stoch))


def sample(
    config: LatentConfig,
    logits: Float[Array, "*lead S K"],
    noise: Float[Array, "*lead S"] | Float[Array, "*lead S K"],
) -> Float[Array, "*lead S K"]:
    """Latents, one-hot, from `noise`, or from standard Gumbel draws, as the reference records."""
    groups = distribution(config, logits)
    if noise.ndim < logits.ndim:
        return groups.sample_uniform(noise)
    return groups.sample_noise(noise)


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
