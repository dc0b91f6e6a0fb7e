"""Distributions of latents, actions and predictions, on top of distrax.

All arithmetic is float32 whatever the dtype of the inputs (`Categorical` and `Normal` keep float64,
which jax makes only if it is asked to). Random draws are arguments:
`sample_noise` turns standard Gumbel or normal noise into a sample, `sample_uniform` a uniform
draw, so that noise for a whole sequence is drawn in one operation outside any scan;
`sample(seed=...)` draws it.
Events cover the last axes: `log_prob` and `entropy` are summed over them.
"""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxwm.numerics import (
    Scalar,
    logsumexp,
    prepend_axes,
    recall_logsumexp,
    symexp,
    symlog,
    twohot_dot,
    twohot_mean,
    wide,
)
from jaxwm.types import JaxwmError, Key

# Log-probability of a class that does not exist: exp gives exactly 0, and products with
# that 0 stay finite, in gradients too (minus infinity would give NaN).
ABSENT = -1e9


def _log_mixture(
    logits: Array, unimix: Scalar, mask: Array | np.ndarray | None = None
) -> tuple[Array, Array]:
    """Logs and values of `(1 - unimix) * softmax + unimix * uniform` over existing classes."""
    logits = wide(logits)
    if mask is not None:
        mask = prepend_axes(jnp.asarray(mask), logits.ndim)
        logits = jnp.where(mask, logits, ABSENT)
    if isinstance(unimix, float | int) and not unimix:  # it may be traced
        logprobs = jax.nn.log_softmax(logits)
        return logprobs, jnp.exp(logprobs)
    exists = jnp.ones((1,) * logits.ndim) if mask is None else mask.astype(jnp.float32)
    count = logits.shape[-1] if mask is None else exists.sum(-1, keepdims=True)
    probs = (1 - unimix) * jax.nn.softmax(logits) + unimix * exists / count
    if not isinstance(unimix, float | int):  # 0 in some members, where a class may have none
        logprobs = jnp.log(jnp.where(probs > 0, probs, 1.0))
        logprobs = jnp.where(unimix > 0, logprobs, jax.nn.log_softmax(logits))
        return logprobs if mask is None else jnp.where(mask, logprobs, ABSENT), probs
    if mask is None:
        return jnp.log(probs), probs
    return jnp.where(mask, jnp.log(jnp.where(mask, probs, 1.0)), ABSENT), probs


class _Distribution(distrax.Distribution):
    """Shapes of a distribution over arrays; the event is the last `event_ndims` axes.

    Shapes are read off the parameters, never stored: under `vmap` they change.
    """

    event_ndims: int = 0

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one draw for every batch entry: batch and event axes."""
        raise NotImplementedError

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self._shape[len(self._shape) - self.event_ndims :]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self._shape[: len(self._shape) - self.event_ndims]

    def _sum(self, x: Array) -> Array:
        return jnp.sum(x, axis=tuple(range(-self.event_ndims, 0)))


class OneHot(_Distribution):
    """S independent one-hot choices among K classes: the discrete latent.

    Args:
      logits: (..., S, K) unnormalised log-probabilities.
      unimix: share of the uniform distribution mixed in, in [0, 1).

    Source: "World model learning" in DreamerV3 (arXiv:2301.04104); straight-through
    gradients as in DreamerV2 (arXiv:2010.02193).
    """

    event_ndims = 2

    def __init__(self, logits: Float[Array, "*batch S K"], unimix: Scalar = 0.0):
        self.logits, self.unimix = logits.astype(jnp.float32), unimix
        self.logprobs, self.probs = _log_mixture(logits, unimix)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.logprobs.shape

    def sample_uniform(self, uniform: Float[Array, "*batch S"]) -> Float[Array, "*batch S K"]:
        """One-hot of the class into whose share of [0, 1) a draw falls, shares in classes' order.

        It takes a draw for each choice, `sample_noise` one for each of its classes. The gradient is
        that of the probabilities.
        """
        classes = self._shape[-1]
        odds = jnp.exp(self.logits - self.logits.max(-1, keepdims=True))
        # Running sums as a product, which is fast everywhere, and the mixture of them unnormalised.
        sums = jnp.einsum(
            "...k,kj->...j", odds, jnp.triu(jnp.ones((classes, classes))), precision="highest"
        )
        total = sums[..., -1:]
        floor = prepend_axes(jnp.arange(1, classes + 1) / classes, sums.ndim)
        edges = (1 - self.unimix) * sums + self.unimix * total * floor
        # The last class takes what rounding leaves.
        index = jnp.sum(uniform[..., None] * total >= edges[..., :-1], -1)
        return self._straight_through(index)

    def sample_noise(self, gumbel: Float[Array, "*batch S K"]) -> Float[Array, "*batch S K"]:
        """One-hot of `argmax(logprobs + gumbel)`, with the gradient of the probabilities."""
        logprobs = prepend_axes(self.logprobs, gumbel.ndim)
        return self._straight_through(jnp.argmax(logprobs + gumbel.astype(jnp.float32), axis=-1))

    def _straight_through(self, index: Int[Array, "*batch S"]) -> Float[Array, "*batch S K"]:
        hard = jax.nn.one_hot(index, self._shape[-1])
        # The bracket is exactly zero, so the sample is exactly one-hot.
        return hard + prepend_axes(self.probs - jax.lax.stop_gradient(self.probs), hard.ndim)

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch S K"]:
        return self.sample_noise(jax.random.gumbel(key, (n, *self._shape)))

    def log_prob(self, value: Num[Array, "*batch S K"]) -> Float[Array, "*batch"]:
        return self._sum(value.astype(jnp.float32) * prepend_axes(self.logprobs, value.ndim))

    def entropy(self) -> Float[Array, "*batch"]:
        return -self._sum(self.probs * self.logprobs)

    def kl_divergence(self, other_dist: "OneHot") -> Float[Array, "*batch"]:
        """KL(self || other_dist) in nats; gradients flow into both."""
        return self._sum(self.probs * (self.logprobs - other_dist.logprobs))

    def mean(self) -> Float[Array, "*batch S K"]:
        return self.probs

    def mode(self) -> Float[Array, "*batch S K"]:
        return jax.nn.one_hot(jnp.argmax(self.logprobs, axis=-1), self._shape[-1])


class Categorical(_Distribution):
    """Integer choices, for discrete actions and observations.

    Args:
      logits: (..., *event, K) unnormalised log-probabilities.
      mask: (*event, K) classes that exist, as from `Discrete.mask`; the others have
        probability exactly 0 and get no gradient. None if all exist.
      unimix: share of the uniform distribution over existing classes, in [0, 1).
      event_ndims: number of event axes, those of the space's shape.

    Raises:
      JaxwmError: if the mask does not fit the logits.
    """

    def __init__(
        self,
        logits: Float[Array, "*batch K"],
        mask: Bool[Array, "..."] | Bool[np.ndarray, "..."] | None = None,
        unimix: Scalar = 0.0,
        event_ndims: int = 0,
    ):
        if mask is not None and mask.shape != logits.shape[logits.ndim - mask.ndim :]:
            raise JaxwmError(
                f"Categorical got a mask of shape {mask.shape} for logits of shape "
                f"{logits.shape}; the mask must have the shape of the last logits axes, "
                "(*space.shape, space.width)."
            )
        self.logprobs, self.probs = _log_mixture(logits, unimix, mask)
        self.event_ndims = event_ndims

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.logprobs.shape[:-1]

    def sample_noise(self, gumbel: Float[Array, "*batch K"]) -> Int[Array, "*batch"]:
        """Index of the largest `logprobs + gumbel`, int32."""
        noisy = prepend_axes(self.logprobs, gumbel.ndim) + wide(gumbel)
        return jnp.argmax(noisy, axis=-1).astype(jnp.int32)

    def _sample_n(self, key: Key, n: int) -> Int[Array, "n *batch"]:
        return self.sample_noise(jax.random.gumbel(key, (n, *self.logprobs.shape)))

    def log_prob(self, value: Int[Array, "*batch"]) -> Float[Array, "..."]:
        chosen = jax.nn.one_hot(value, self.logprobs.shape[-1])
        return self._sum(jnp.sum(chosen * prepend_axes(self.logprobs, chosen.ndim), axis=-1))

    def entropy(self) -> Float[Array, "..."]:
        return -self._sum(jnp.sum(self.probs * self.logprobs, axis=-1))

    def mode(self) -> Int[Array, "*batch"]:
        return jnp.argmax(self.logprobs, axis=-1).astype(jnp.int32)


class TwoHot(_Distribution):
    """A scalar as a categorical over bins: rewards and values.

    `log_prob` of a value is the negative cross-entropy with its two-hot weights.

    Args:
      logits: (..., n) unnormalised log-probabilities of the bins.
      bins: (n,) positions, ascending and mirrored about zero, as from `symexp_bins`.
      total: (...) `total()` of another distribution of the same logits: it is not computed again.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """

    def __init__(
        self,
        logits: Float[Array, "*batch n"],
        bins: Float[Array, " n"],
        total: Float[Array, "*batch"] | None = None,
    ):
        self.logits = logits.astype(jnp.float32)
        self.bins, self._total = bins, total

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.logits.shape[:-1]

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        return self.bins[jax.random.categorical(key, self.logits, shape=(n, *self._shape))]

    def log_prob(self, value: Num[Array, "*batch"]) -> Float[Array, "*batch"]:
        # The weights add up to 1, so that the normaliser can be taken out of the sum.
        logits = jnp.broadcast_to(self.logits, (*value.shape, self.logits.shape[-1]))
        return twohot_dot(logits, value, self.bins) - prepend_axes(self.total(), value.ndim)

    def total(self) -> Float[Array, "*batch"]:
        """The logarithm of what normalises the exponentials of the logits."""
        if self._total is None:
            return logsumexp(self.logits)
        return recall_logsumexp(self._total, self.logits)

    def mean(self) -> Float[Array, "*batch"]:
        """Expected bin position; exactly 0 for uniform logits."""
        return twohot_mean(self.logits, self.bins)

    def mode(self) -> Float[Array, "*batch"]:
        """The mean: the most probable bin would be a coarse guess."""
        return self.mean()


class Normal(_Distribution):
    """Independent normals.

    Args:
      loc: (..., *event) means.
      scale: (..., *event) standard deviations, positive.
      event_ndims: number of event axes, those of the space's shape.
    """

    def __init__(
        self, loc: Float[Array, "*batch"], scale: Float[Array, "*batch"], event_ndims: int = 1
    ):
        self.loc, self.scale = wide(loc), wide(scale)
        self.event_ndims = event_ndims

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.loc.shape

    def sample_noise(self, normal: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """`mean + std * normal`; gradients flow into both parameters."""
        loc, scale = (prepend_axes(x, normal.ndim) for x in (self.loc, self.scale))
        return loc + scale * wide(normal)

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        return self.sample_noise(jax.random.normal(key, (n, *self._shape)))

    def log_prob(self, value: Float[Array, "*batch"]) -> Float[Array, "..."]:
        loc, scale = (prepend_axes(x, value.ndim) for x in (self.loc, self.scale))
        error = (wide(value) - loc) / scale
        return -self._sum(0.5 * jnp.square(error) + jnp.log(scale) + 0.5 * np.log(2 * np.pi))

    def entropy(self) -> Float[Array, "..."]:
        return self._sum(jnp.log(self.scale) + 0.5 * np.log(2 * np.pi * np.e))

    def stddev(self) -> Float[Array, "*batch"]:
        return self.scale

    def mean(self) -> Float[Array, "*batch"]:
        return self.loc

    def mode(self) -> Float[Array, "*batch"]:
        return self.loc


class BoundedNormal(Normal):
    """Independent normals with means in (-1, 1) and bounded standard deviations.

    `mean = tanh(mean_raw)`, `std = (max_std - min_std) * sigmoid(std_raw + 2) + min_std`.
    Samples are not squashed and may leave [-1, 1].

    Args:
      mean_raw: (..., *event) network output for the mean.
      std_raw: (..., *event) network output for the standard deviation.
      min_std: smallest standard deviation.
      max_std: largest standard deviation.
      event_ndims: number of event axes, those of the space's shape.

    Source: github.com/danijar/dreamerv3, the policy of continuous actions.
    """

    def __init__(
        self,
        mean_raw: Float[Array, "*batch"],
        std_raw: Float[Array, "*batch"],
        min_std: float = 0.1,
        max_std: float = 1.0,
        event_ndims: int = 1,
    ):
        share = jax.nn.sigmoid(wide(std_raw) + 2.0)
        scale = (max_std - min_std) * share + min_std
        super().__init__(jnp.tanh(wide(mean_raw)), scale, event_ndims)


class SoftBernoulli(_Distribution):
    """Yes or no, with targets that may be probabilities: the continue flag.

    Args:
      logit: (...) log-odds of yes.
    """

    def __init__(self, logit: Float[Array, "*batch"]):
        self.logit = logit.astype(jnp.float32)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.logit.shape

    @property
    def probs(self) -> Float[Array, "*batch"]:
        """Probability of yes."""
        return jax.nn.sigmoid(self.logit)

    def _sample_n(self, key: Key, n: int) -> Bool[Array, "n *batch"]:
        uniform = jax.random.uniform(key, (n, *self._shape))
        return uniform < prepend_axes(self.probs, uniform.ndim)

    def log_prob(
        self, value: Num[Array, "*batch"] | Bool[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """`t * log(p) + (1 - t) * log(1 - p)` for targets t in [0, 1]."""
        target = value.astype(jnp.float32)
        logit = prepend_axes(self.logit, target.ndim)
        yes, no = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
        return target * yes + (1 - target) * no

    def entropy(self) -> Float[Array, "*batch"]:
        return -self.log_prob(self.probs)

    def mean(self) -> Float[Array, "*batch"]:
        return self.probs

    def mode(self) -> Bool[Array, "*batch"]:
        return self.logit > 0


class SymlogSquaredError(_Distribution):
    """A prediction in symlog space: a normal of standard deviation sqrt(1/2), unnormalised.

    `log_prob(target) = -sum((pred - symlog(target))^2)`, the constant left out. Samples are
    the mode: nobody models the noise.

    Args:
      pred: (..., *event) prediction in symlog space.
      event_ndims: number of event axes, those of the space's shape.

    Source: "Symlog predictions" in DreamerV3 (arXiv:2301.04104).
    """

    def __init__(self, pred: Float[Array, "*batch"], event_ndims: int = 1):
        self.pred = pred.astype(jnp.float32)
        self.event_ndims = event_ndims

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.pred.shape

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        del key
        return jnp.broadcast_to(self.mode(), (n, *self._shape))

    def log_prob(self, value: Num[Array, "*batch"]) -> Float[Array, "..."]:
        pred = prepend_axes(self.pred, value.ndim)
        return -self._sum(jnp.square(pred - symlog(value)))

    def mean(self) -> Float[Array, "*batch"]:
        return self.mode()

    def mode(self) -> Float[Array, "*batch"]:
        return symexp(self.pred)


class ImageSquaredError(_Distribution):
    """A predicted image: a normal of standard deviation sqrt(1/2) in 0..1, unnormalised.

    `log_prob(image) = -sum((pred - image / 255)^2)`, the constant left out. Samples are the
    mode: nobody models the noise.

    Args:
      pred: (..., h, w, c) prediction in 0..1.

    Source: "World model learning" in DreamerV3 (arXiv:2301.04104).
    """

    event_ndims = 3

    def __init__(self, pred: Float[Array, "*batch h w c"]):
        self.pred = pred.astype(jnp.float32)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.pred.shape

    def _sample_n(self, key: Key, n: int) -> Num[Array, "n *batch h w c"]:
        del key
        return jnp.broadcast_to(self.mode(), (n, *self._shape))

    def log_prob(self, value: Num[Array, "*batch h w c"]) -> Float[Array, "*batch"]:
        """Of a uint8 or float image in 0..255."""
        pred = prepend_axes(self.pred, value.ndim)
        return -self._sum(jnp.square(pred - value.astype(jnp.float32) / 255))

    def mean(self) -> Num[Array, "*batch h w c"]:
        return self.mode()

    def mode(self) -> Num[Array, "*batch h w c"]:
        """The prediction as a uint8 image."""
        return jnp.clip(jnp.round(self.pred * 255), 0, 255).astype(jnp.uint8)
