"""Distributions of latents, actions and predictions, on top of distrax.

All arithmetic is float32 whatever the dtype of the inputs (`Categorical` and `Normal` keep float64,
which jax makes only if it is asked to). Random draws are arguments:
`sample_noise` turns the standard noise of a distribution (Gumbel, normal, for `TruncatedNormal`
uniform) into a sample, `OneHot.sample_uniform` uniform draws, so that noise for a whole sequence is
drawn in one operation outside any scan; `sample(seed=...)` draws it.
Events cover the last axes: `log_prob` and `entropy` are summed over them.
"""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Bool, Float, Int, Num

from jaxwm.numerics import (
    Scalar,
    logsumexp,
    prepend_axes,
    symexp,
    symlog,
    twohot_dot,
    twohot_mean,
    wide,
)
from jaxwm.types import JaxwmError, Key

sg = jax.lax.stop_gradient

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

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """

    def __init__(self, logits: Float[Array, "*batch n"], bins: Float[Array, " n"]):
        self.logits, self.bins = logits.astype(jnp.float32), bins

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.logits.shape[:-1]

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        return self.bins[jax.random.categorical(key, self.logits, shape=(n, *self._shape))]

    def log_prob(self, value: Num[Array, "*batch"]) -> Float[Array, "*batch"]:
        # The weights add up to 1, so the normaliser can be taken out of the sum.
        logits = jnp.broadcast_to(self.logits, (*value.shape, self.logits.shape[-1]))
        total = prepend_axes(logsumexp(self.logits), value.ndim)
        return twohot_dot(logits, value, self.bins) - total

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

    def kl_divergence(self, other_dist: "Normal") -> Float[Array, "..."]:
        """KL(self || other_dist) in nats; gradients flow into both."""
        ratio = self.scale / other_dist.scale
        shift = (self.loc - other_dist.loc) / other_dist.scale
        return 0.5 * self._sum(jnp.square(ratio) + jnp.square(shift) - 1 - 2 * jnp.log(ratio))

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


class UnitNormal(_Distribution):
    """Independent normals of variance one around predicted means.

        log_prob(x) = -sum((x - mean)^2 + log(2 pi)) / 2

    Samples are the mean: nobody models the noise.

    Args:
      loc: (..., *event) predicted means.
      event_ndims: number of event axes, those of the space's shape.
    """

    def __init__(self, loc: Float[Array, "*batch"], event_ndims: int = 1):
        self.loc = loc.astype(jnp.float32)
        self.event_ndims = event_ndims

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.loc.shape

    def _sample_n(self, key: Key, n: int) -> Num[Array, "n *batch"]:
        del key
        return jnp.broadcast_to(self.mode(), (n, *self._shape))

    def log_prob(self, value: Num[Array, "*batch"]) -> Float[Array, "..."]:
        error = prepend_axes(self.loc, value.ndim) - value.astype(jnp.float32)
        return -0.5 * self._sum(jnp.square(error) + np.log(2 * np.pi))

    def mean(self) -> Float[Array, "*batch"]:
        return self.loc

    def mode(self) -> Num[Array, "*batch"]:
        return self.loc


class TanhNormal(_Distribution):
    """Independent normals squashed into (-1, 1): the actions of Dreamer V1.

        a = tanh(x),   x ~ Normal(loc, scale)
        log p(a) = log Normal(x; loc, scale) - 2 * (log(2) - x - softplus(-2 x))

    The entropy has no closed form, and the density of a wide normal is largest at the ends of the
    range: both are estimated from draws, by `entropy_noise` and `mode_noise`.

    Args:
      loc: (..., *event) means before the tanh.
      scale: (..., *event) standard deviations before the tanh, positive.
      event_ndims: number of event axes, those of the space's shape.

    Source: "Action model" in Dreamer (arXiv:1912.01603) and its code.
    """

    def __init__(
        self, loc: Float[Array, "*batch"], scale: Float[Array, "*batch"], event_ndims: int = 1
    ):
        self.normal = Normal(loc, scale, event_ndims)
        self.event_ndims = event_ndims

    @classmethod
    def from_raw(
        cls,
        mean_raw: Float[Array, "*batch"],
        std_raw: Float[Array, "*batch"],
        init_std: Scalar = 5.0,
        event_ndims: int = 1,
    ) -> "TanhNormal":
        """From a network's output, see Dreamer V1.

        `loc = 5 tanh(mean_raw / 5)`, `scale = softplus(std_raw + log(exp(init_std) - 1)) + 1e-4`.

        Args:
          mean_raw: (..., *event) output for the mean.
          std_raw: (..., *event) output for the standard deviation.
          init_std: the standard deviation where `std_raw` is 0.
          event_ndims: number of event axes.
        """
        shift = jnp.log(jnp.expm1(jnp.asarray(init_std, jnp.float32)))
        scale = jax.nn.softplus(wide(std_raw) + shift) + 1e-4
        return cls(5 * jnp.tanh(wide(mean_raw) / 5), scale, event_ndims)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.normal._shape

    def sample_noise(self, normal: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """`tanh(mean + std * normal)`; gradients flow into both parameters."""
        return jnp.tanh(self.normal.sample_noise(normal))

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        return self.sample_noise(jax.random.normal(key, (n, *self._shape)))

    def log_prob(self, value: Float[Array, "*batch"]) -> Float[Array, "..."]:
        """Of actions in [-1, 1]; those at the ends count as the nearest numbers inside."""
        return self._log_prob_before(self.before(value))

    def before(self, value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """What the tanh turned into actions in [-1, 1]."""
        most = 0.99999994  # the largest float32 below 1
        return jnp.arctanh(jnp.clip(wide(value), -most, most))

    def stretch(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The logarithm of the derivative of tanh, without loss where that is almost 0."""
        return 2 * (np.log(2.0) - x - jax.nn.softplus(-2 * x))

    def _log_prob_before(self, x: Float[Array, "*batch"]) -> Float[Array, "..."]:
        """The log-density at `tanh(x)`, also where that is 1 to rounding."""
        return self.normal.log_prob(x) - self._sum(self.stretch(x))

    def entropy_noise(self, normal: Float[Array, "n *batch"]) -> Float[Array, "..."]:
        """The entropy estimated from n samples, the negative mean of their log-densities."""
        return -self._log_prob_before(self.normal.sample_noise(normal)).mean(0)

    def mode_noise(self, normal: Float[Array, "n *batch"]) -> Float[Array, "*batch"]:
        """Of n samples the most likely one, for every batch entry by itself."""
        index = self.most_likely(normal)
        index = index.reshape(1, *index.shape, *(1,) * self.event_ndims)
        return jnp.take_along_axis(self.sample_noise(normal), index, 0)[0]

    def most_likely(self, normal: Float[Array, "n *batch"]) -> Int[Array, "..."]:
        """Which of n samples has the largest density, for every batch entry."""
        return jnp.argmax(self._log_prob_before(self.normal.sample_noise(normal)), 0)

    def mode(self) -> Float[Array, "*batch"]:
        """The median, `tanh(loc)`, which needs no draws; see `mode_noise`."""
        return jnp.tanh(self.normal.loc)


class TruncatedNormal(_Distribution):
    """Independent normals cut off at -1 and 1: the continuous actions of Dreamer V2.

        a = loc + scale * z,   z = Phi^-1(Phi(lo) + u * (Phi(hi) - Phi(lo)))

    with lo and hi the ends in units of `scale` from `loc`, and u uniform. Actions are kept 1e-6
    away from the ends.

    The gradient of a sample is the one that the authors' code has in fact: `da/dloc = 1` and
    `da/dscale = z`, as if nothing was cut off. `implicit` gives the exact one, in which
    `phi(z) dz = (1 - u) phi(lo) dlo + u phi(hi) dhi`.

    Args:
      loc: (..., *event) means before the cut, in [-1, 1].
      scale: (..., *event) standard deviations before the cut, positive.
      event_ndims: number of event axes, those of the space's shape.
      implicit: whether samples have the exact gradient.

    Source: DreamerV2 (arXiv:2010.02193) and its code; "Implicit Reparameterization Gradients"
    (arXiv:1805.08498).
    """

    def __init__(
        self,
        loc: Float[Array, "*batch"],
        scale: Float[Array, "*batch"],
        event_ndims: int = 1,
        implicit: bool = False,
    ):
        self.loc, self.scale = wide(loc), wide(scale)
        self.event_ndims, self.implicit = event_ndims, implicit

    @classmethod
    def from_raw(
        cls,
        mean_raw: Float[Array, "*batch"],
        std_raw: Float[Array, "*batch"],
        min_std: Scalar = 0.1,
        shift: Scalar = 0.0,
        event_ndims: int = 1,
        implicit: bool = False,
    ) -> "TruncatedNormal":
        """From a network's output, see Dreamer V2.

        `loc = tanh(mean_raw)`, `scale = 2 sigmoid((std_raw + shift) / 2) + min_std`.

        Args:
          mean_raw: (..., *event) output for the mean.
          std_raw: (..., *event) output for the standard deviation.
          min_std: smallest standard deviation.
          shift: added to `std_raw`.
          event_ndims: number of event axes.
          implicit: whether samples have the exact gradient.
        """
        scale = 2 * jax.nn.sigmoid((wide(std_raw) + shift) / 2) + min_std
        return cls(jnp.tanh(wide(mean_raw)), scale, event_ndims, implicit)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.loc.shape

    @property
    def _ends(self) -> tuple[Array, Array]:
        """The ends of the range in units of `scale` from `loc`."""
        return (-1 - self.loc) / self.scale, (1 - self.loc) / self.scale

    def sample_noise(self, uniform: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Actions from uniform draws in [0, 1), with the gradient told above."""
        lo, hi, loc, scale = (
            prepend_axes(x, uniform.ndim) for x in (*self._ends, self.loc, self.scale)
        )
        below, above = ndtr(lo), ndtr(hi)
        z = sg(jnp.clip(ndtri(below + uniform * (above - below)), lo, hi))
        if self.implicit:
            density = lambda x: sg(jnp.exp((jnp.square(z) - jnp.square(x)) / 2))  # noqa: E731
            z += (1 - uniform) * density(lo) * (lo - sg(lo)) + uniform * density(hi) * (hi - sg(hi))
        action = loc + scale * z
        inside = jnp.clip(action, -1 + 1e-6, 1 - 1e-6)
        return action + sg(inside - action)

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch"]:
        return self.sample_noise(jax.random.uniform(key, (n, *self._shape)))

    def _log_mass(self) -> Float[Array, "*batch"]:
        """The logarithm of the normals' probability to lie between the ends."""
        lo, hi = self._ends
        return jnp.log(ndtr(hi) - ndtr(lo))

    def log_prob(self, value: Float[Array, "*batch"]) -> Float[Array, "..."]:
        """Of actions in [-1, 1]; elsewhere it would be minus infinity, which is not checked."""
        loc, scale, mass = (
            prepend_axes(x, value.ndim) for x in (self.loc, self.scale, self._log_mass())
        )
        z = (wide(value) - loc) / scale
        return -self._sum(0.5 * jnp.square(z) + 0.5 * np.log(2 * np.pi) + jnp.log(scale) + mass)

    def entropy(self) -> Float[Array, "..."]:
        lo, hi = self._ends
        density = lambda x: jnp.exp(-0.5 * jnp.square(x)) / np.sqrt(2 * np.pi)  # noqa: E731
        mass = self._log_mass()
        cut = (lo * density(lo) - hi * density(hi)) / (2 * jnp.exp(mass))
        return self._sum(0.5 * np.log(2 * np.pi * np.e) + jnp.log(self.scale) + mass + cut)

    def mode(self) -> Float[Array, "*batch"]:
        return jnp.clip(self.loc, -1, 1)


class OneHotAction(_Distribution):
    """Choices as one-hot vectors, through which gradients flow: discrete actions in a dream.

    Args:
      logits: (..., *event, K) unnormalised log-probabilities.
      mask: (*event, K) classes that exist, see `Categorical`; None if all do.
      event_ndims: number of event axes, K excluded: those of the space's shape.

    Source: DreamerV2 (arXiv:2010.02193) and its code.
    """

    def __init__(
        self,
        logits: Float[Array, "*batch K"],
        mask: Bool[Array, "..."] | Bool[np.ndarray, "..."] | None = None,
        event_ndims: int = 0,
    ):
        self.choice = Categorical(logits, mask, event_ndims=event_ndims)
        self.event_ndims = event_ndims + 1

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.choice.logprobs.shape

    @property
    def probs(self) -> Float[Array, "*batch K"]:
        return self.choice.probs

    def sample_noise(self, gumbel: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
        """One-hot of `argmax(logprobs + gumbel)`, with the gradient of the probabilities."""
        hard = jax.nn.one_hot(self.choice.sample_noise(gumbel), self._shape[-1])
        return hard + prepend_axes(self.probs - sg(self.probs), hard.ndim)

    def _sample_n(self, key: Key, n: int) -> Float[Array, "n *batch K"]:
        return self.sample_noise(jax.random.gumbel(key, (n, *self._shape)))

    def log_prob(self, value: Num[Array, "*batch K"]) -> Float[Array, "..."]:
        """Of one-hot vectors, into which no gradient flows."""
        return self._sum(sg(value) * prepend_axes(self.choice.logprobs, value.ndim))

    def entropy(self) -> Float[Array, "..."]:
        return self.choice.entropy()

    def mode(self) -> Float[Array, "*batch K"]:
        return jax.nn.one_hot(self.choice.mode(), self._shape[-1])


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
