"""The stochastic states: categorical or Gaussian, and the forms of their KL losses.

A categorical state has S groups of K classes and is sampled with a straight-through gradient. A
Gaussian one is sampled as mean + std * noise. `balanced_kl`, `floored_kl` and `excess_kl` are the
KL losses of Dreamer V2, Dreamer V1 and PlaNet; DreamerV3's is part of `categorical`.

Source: PlaNet (arXiv:1811.04551) for the Gaussian, DreamerV2 (arXiv:2010.02193) for the categories
and the balanced KL, DreamerV3 (arXiv:2301.04104) for the mixture with the uniform distribution.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Integer

from jaxwm import dists
from jaxwm.config import at_least, positive, share
from jaxwm.numerics import Scalar
from jaxwm.types import Array, Float, Key, PyTree

sg = jax.lax.stop_gradient


class LatentSpace(NamedTuple):
    """A stochastic state as pure functions, flat (..., size) outside of them.

    Attributes:
      size: length of the flat state.
      outputs: numbers that a network gives to describe its distribution.
      draws: `key, lead -> draws` for states of shape `lead`.
      sample: `raw (..., outputs), draws -> state (..., size)`, with a gradient into `raw`.
      divergence: `raw, raw (..., outputs) -> KL (...)` of the first from the second, in nats.
      kl: `posterior raw, prior raw (T, B, outputs) -> {name: losses}`.
      entropy: `raw -> (...)` in nats.
      pack: `state -> compact`, for storage.
      unpack: `compact -> state`.
    """

    size: int
    outputs: int
    draws: Callable[..., PyTree]
    sample: Callable[..., Array]
    divergence: Callable[[Array, Array], Array]
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
    """Groups of one-hot classes; networks give their logits, flat.

    Its `kl` is that of DreamerV3: "dyn" trains the prior towards the posterior and "rep" the
    posterior towards the prior, each row only while it is above the free nats,

        dyn = max(free, KL(sg(post) || prior)),   rep = max(free, KL(post || sg(prior))).

    `draws` gives uniform numbers (..., S); `sample` also takes Gumbel noise (..., S, K).
    """
    stoch, classes = config.stoch, config.classes

    def groups(raw: Float[Array, "*lead outputs"]) -> dists.OneHot:
        return dists.OneHot(raw.reshape(*raw.shape[:-1], stoch, classes), config.unimix)

    def draws(key: Key, lead: tuple[int, ...]) -> Float[Array, "*lead S"]:
        return jax.random.uniform(key, (*lead, stoch))

    def sample(
        raw: Float[Array, "*lead outputs"],
        draws: Float[Array, "*lead S"] | Float[Array, "*lead S K"],
    ) -> Float[Array, "*lead outputs"]:
        dist = groups(raw)
        uniform = draws.ndim == raw.ndim
        state = dist.sample_uniform(draws) if uniform else dist.sample_noise(draws)
        return state.reshape(raw.shape)

    def divergence(
        first: Float[Array, "*lead outputs"], second: Float[Array, "*lead outputs"]
    ) -> Float[Array, "*lead"]:
        return groups(first).kl_divergence(groups(second))

    def kl(
        post: Float[Array, "*lead outputs"], prior: Float[Array, "*lead outputs"]
    ) -> dict[str, Array]:
        return {
            "dyn": jnp.maximum(divergence(sg(post), prior), config.free_nats),
            "rep": jnp.maximum(divergence(post, sg(prior)), config.free_nats),
        }

    def pack(state: Float[Array, "*lead outputs"]) -> Integer[Array, "*lead S"]:
        index = jnp.argmax(state.reshape(*state.shape[:-1], stoch, classes), -1)
        return index.astype(jnp.uint8 if classes <= 256 else jnp.int32)

    def unpack(index: Integer[Array, "*lead S"]) -> Float[Array, "*lead outputs"]:
        return jax.nn.one_hot(index, classes).reshape(*index.shape[:-1], -1)

    return LatentSpace(
        size=stoch * classes,
        outputs=stoch * classes,
        draws=draws,
        sample=sample,
        divergence=divergence,
        kl=kl,
        entropy=lambda raw: groups(raw).entropy(),
        pack=pack,
        unpack=unpack,
    )


@dataclasses.dataclass(frozen=True)
class GaussianConfig:
    """Size and shape of the Gaussian latent.

    Args:
      stoch: number of dimensions S.
      std: how the network's output x becomes a standard deviation: "softplus" is
        log(1 + exp(x)), "sigmoid" 1 / (1 + exp(-x)), "sigmoid2" 2 / (1 + exp(-x / 2)).
      min_std: added to that, in (0, inf).
    """

    stoch: int = 30
    std: Literal["softplus", "sigmoid", "sigmoid2"] = "softplus"
    min_std: float = 0.1

    def __post_init__(self):
        at_least(self, 1, "stoch")
        positive(self, "min_std")


STDS: dict[str, Callable[[Array], Array]] = {
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "sigmoid2": lambda x: 2 * jax.nn.sigmoid(x / 2),
}


def moments(
    config: GaussianConfig, raw: Float[Array, "*lead outputs"]
) -> tuple[Float[Array, "*lead S"], Float[Array, "*lead S"]]:
    """Means and standard deviations that a network's output describes."""
    mean, x = jnp.split(raw.astype(jnp.float32), 2, -1)
    return mean, STDS[config.std](x) + config.min_std


def gaussian(config: GaussianConfig) -> LatentSpace:
    """A diagonal Gaussian; networks give [mean, x] with the standard deviation made of x.

    Its `kl` is the plain divergence; papers use one of the forms below instead.
    """

    def normal(raw: Float[Array, "*lead outputs"]) -> dists.Normal:
        return dists.Normal(*moments(config, raw))

    def draws(key: Key, lead: tuple[int, ...]) -> Float[Array, "*lead S"]:
        return jax.random.normal(key, (*lead, config.stoch))

    def divergence(
        first: Float[Array, "*lead outputs"], second: Float[Array, "*lead outputs"]
    ) -> Float[Array, "*lead"]:
        return normal(first).kl_divergence(normal(second))

    return LatentSpace(
        size=config.stoch,
        outputs=2 * config.stoch,
        draws=draws,
        sample=lambda raw, draws: normal(raw).sample_noise(draws),
        divergence=divergence,
        kl=lambda post, prior: {"kl": divergence(post, prior)},
        entropy=lambda raw: normal(raw).entropy(),
        pack=lambda state: state,
        unpack=lambda state: state,
    )


def balanced_kl(
    latent: LatentSpace,
    balance: Scalar = 0.8,
    free_nats: Scalar = 0.0,
    mean_first: bool = True,
    forward: bool = False,
) -> LatentSpace:
    """The KL loss of Dreamer V2, which trains the prior more than the posterior.

        kl = balance * max(free, mean KL(sg(post) || prior))
             + (1 - balance) * max(free, mean KL(post || sg(prior)))

    With a balance of one half it is a single term, max(free, KL(post || prior)) of every row.

    Args:
      latent: the stochastic state.
      balance: share of the loss that trains the prior, in [0, 1].
      free_nats: divergence below which a side is not trained, in nats.
      mean_first: whether free nats are compared with the mean over the batch, or with every row.
      forward: whether it is KL(prior || post) instead, balanced likewise.

    Returns:
      The state with the loss "kl".

    Source: "KL balancing" in DreamerV2 (arXiv:2010.02193) and its code.
    """

    def kl(post: Float[Array, "*lead outputs"], prior: Float[Array, "*lead outputs"]) -> Any:
        left, right = (prior, post) if forward else (post, prior)
        share = balance if forward else 1 - balance
        sides = latent.divergence(left, sg(right)), latent.divergence(sg(left), right)
        if mean_first:
            sides = sides[0].mean(), sides[1].mean()
        first, second = (jnp.maximum(side, free_nats).mean() for side in sides)
        single = jnp.maximum(latent.divergence(left, right), free_nats).mean()
        # The balance may be traced, so the choice is made in the program.
        return {"kl": jnp.where(balance == 0.5, single, share * first + (1 - share) * second)}

    return latent._replace(kl=kl)


def floored_kl(latent: LatentSpace, free_nats: Scalar = 3.0) -> LatentSpace:
    """The KL loss of Dreamer V1: max(free, mean KL(post || prior)).

    Source: Dreamer (arXiv:1912.01603) and its code.
    """
    return latent._replace(
        kl=lambda post, prior: {"kl": jnp.maximum(latent.divergence(post, prior).mean(), free_nats)}
    )


def excess_kl(latent: LatentSpace, free_nats: Scalar = 3.0) -> LatentSpace:
    """The KL loss of PlaNet: max(0, KL(post || prior) - free) of every row.

    Source: PlaNet (arXiv:1811.04551) and its code. The paper's text has max(free, KL), which has
    the same gradient.
    """
    return latent._replace(
        kl=lambda post, prior: {"kl": jnp.maximum(latent.divergence(post, prior) - free_nats, 0.0)}
    )
