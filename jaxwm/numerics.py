"""Squashing, two-hot bins and running statistics: the arithmetic every model shares.

All results are float32 whatever comes in, because bins reach 5e8 and running statistics
move by a hundredth per update. Statistics are NamedTuple states: an `_init`, an `_update`
that mixes in one batch, and a `_scale` that reads the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from jaxwm import backend
from jaxwm.types import ALONE, JaxwmError, PyTree, Shards

# A number of a configuration; traced, where a sweep gives each member its own.
Scalar = float | Float[Array, ""]

Statistics = TypeVar("Statistics")


def prepend_axes(x: Shaped[Array, "..."], ndim: int) -> Shaped[Array, "..."]:
    """`x` with leading axes of size 1 until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def wide(x: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32; float64 stays, which jax makes only if it is asked to."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _odd(function: Callable[[Array], Array], x: Array) -> Array:
    """`function(|x|)` with the sign of x; unlike `sign(x) * f(abs(x))` smooth at zero."""
    x = x.astype(jnp.float32)
    negative = x < 0
    size = function(jnp.where(negative, -x, x))
    return jnp.where(negative, -size, size)


def symlog(x: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Squash any magnitude: `sign(x) * log(1 + |x|)`.

    Args:
      x: numbers in any units.

    Returns:
      float32 of the same shape; the identity to first order at 0, also for gradients.

    Source: "Symlog predictions" in DreamerV3 (arXiv:2301.04104).
    """
    return _odd(jnp.log1p, x)


def symexp(x: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Undo `symlog`: `sign(x) * (exp(|x|) - 1)`; infinite beyond |x| of about 88.

    Args:
      x: numbers in symlog space.

    Returns:
      float32 of the same shape, in the units `symlog` was given.

    Source: "Symlog predictions" in DreamerV3 (arXiv:2301.04104).
    """
    return _odd(jnp.expm1, x)


def symexp_bins(n: int = 255) -> Float[Array, " n"]:
    """Exponentially spaced bins from -symexp(20) to symexp(20), exactly mirrored.

    The lower half is `symexp(linspace(-20, 0))` and the upper half its negative. For odd
    `n` 0 is the middle bin; for even `n` it appears twice.

    Args:
      n: number of bins, at least 3.

    Returns:
      Ascending float32 positions in raw units; the ends are at 4.85e8.

    Raises:
      JaxwmError: if `n` is too small to hold both ends and zero.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """
    if n < 3:
        raise JaxwmError(f"symexp_bins got n={n}, but needs at least 3: both ends and zero.")
    half = symexp(jnp.linspace(-20.0, 0.0, (n + 1) // 2, dtype=jnp.float32))
    return jnp.concatenate([half, -half[::-1][n % 2 :]])


def twohot(value: Num[Array, "*batch"], bins: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    """Spread each value over the two bins around it so that the weighted mean is the value.

    The weights are linear in raw space and sum to 1. Values beyond an end, infinite ones
    too, put all mass on the end bin; where two bins coincide the later one counts; a NaN
    gives NaN weights.

    Args:
      value: numbers in the units of `bins`.
      bins: ascending positions, as from `symexp_bins`.

    Returns:
      Weights in [0, 1]. No gradient flows to `value` or `bins`.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """
    return backend.plain.interpolation_weights(*_between(value, bins), bins.shape[-1])


def twohot_dot(
    logits: Float[Array, "*batch n"], value: Num[Array, "*batch"], bins: Float[Array, " n"]
) -> Float[Array, "*batch"]:
    """`sum(twohot(value, bins) * logits)`, of which the two terms that count are read alone.

    Args:
      logits: numbers of the bins; gradients flow to them.
      value: see `twohot`.
      bins: see `twohot`.
    """
    return backend.interpolate(logits, *_between(value, bins))


def _between(value: Array, bins: Array) -> tuple[Array, Array]:
    """Which bin is the last below a value, and the share of the next one."""
    value, bins = jax.lax.stop_gradient((value.astype(jnp.float32), bins))
    last = bins.shape[-1] - 1
    below = jnp.sum(prepend_axes(bins, value.ndim + 1) <= value[..., None], -1) - 1
    below = jnp.clip(below, 0, last - 1)
    lower, upper = bins[below], bins[below + 1]
    return below, (jnp.clip(value, bins[0], bins[last]) - lower) / (upper - lower)


def softmax(logits: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Probabilities proportional to `exp(logits)`."""
    weights = jnp.exp(logits - _constant_peak(logits))
    return weights / jnp.sum(weights, -1, keepdims=True)


def logsumexp(logits: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """`log(sum(exp(logits)))` over the last axis, which must be finite."""
    peak = _constant_peak(logits)
    return jnp.log(jnp.sum(jnp.exp(logits - peak), -1)) + peak[..., 0]


def _constant_peak(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """The largest number of the last axis, without a gradient."""
    return backend.largest(jax.lax.stop_gradient(x))


def twohot_mean(
    logits: Float[Array, "*batch n"], bins: Float[Array, " n"]
) -> Float[Array, "*batch"]:
    """Expected bin position, exactly 0 for logits symmetric about zero.

    Adds `(p[n-1-i] - p[i]) * bins[n-1-i]` over mirrored pairs, so that equal probabilities
    cancel before they are multiplied by positions of up to 5e8, where a plain sum leaves noise.
    The difference is taken as `(p' + p) * tanh((l' - l) / 2)`: exact to the last bit of the
    logits, where two rounded probabilities of 1/255 still leave 0.1 in the mean.

    Args:
      logits: unnormalised log-probabilities of the bins.
      bins: positions with `bins[i] = -bins[n-1-i]`, as from `symexp_bins`.

    Returns:
      The mean, in the units of `bins`; gradients flow to `logits`.

    Source: own derivation.
    """
    half = bins.shape[-1] // 2
    logits = logits.astype(jnp.float32)
    probs = softmax(logits)
    both = probs[..., -half:] + probs[..., :half][..., ::-1]
    surplus = both * jnp.tanh((logits[..., -half:] - logits[..., :half][..., ::-1]) / 2)
    return jnp.sum(surplus * prepend_axes(bins[-half:], logits.ndim), axis=-1)


def fold_mirrored(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Replaces each mirrored pair by its sum and its difference; the middle entry stays.

    Where both entries of a pair are equal to the last bit, their difference is exactly 0, and stays
    so however such arrays are added up: then `unfold_mirrored` gives equal entries. Added up as
    they are, in an order that depends on their place, they would differ by rounding, which
    `twohot_mean` multiplies by up to 5e8.

    Args:
      x: numbers of which the last axis has a middle, such as gradients of two-hot logits.

    Source: own derivation.
    """
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., -half:][..., ::-1]
    return jnp.concatenate([low + high, x[..., half:-half], low - high], -1)


def unfold_mirrored(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Undoes `fold_mirrored`, to rounding."""
    half = x.shape[-1] // 2
    both, apart = x[..., :half], x[..., -half:]
    high = (both - apart) / 2
    return jnp.concatenate([(both + apart) / 2, x[..., half:-half], high[..., ::-1]], -1)


def keep_mirrored(shards: Shards, *heads: str) -> Shards:
    """Shards whose means keep equal gradients of mirrored bins equal; see `fold_mirrored`.

    Devices that pass sums around a ring add up every part of a tensor in another order. If a device
    holds only a part of each tensor, a pair may lie on two devices, and stays rounded as it is.

    Args:
      shards: how the shards of the training meet.
      heads: paths, in the tree that `mean` takes or below, of the layers whose last axis is the
        bins, such as "behavior/value/out".
    """
    if shards is ALONE or not shards.whole:
        return shards

    def at_heads(function: Callable[[Array], Array], tree: PyTree) -> PyTree:
        def leaf(path: Any, x: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return function(x) if any(f"/{head}/" in f"/{name}" for head in heads) else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    return shards._replace(
        mean=lambda tree: at_heads(unfold_mirrored, shards.mean(at_heads(fold_mirrored, tree)))
    )


class Percentiles(NamedTuple):
    """Moving averages of a low and a high percentile, in the units of the data."""

    lo: Float[Array, ""]
    hi: Float[Array, ""]


class Moments(NamedTuple):
    """Moving averages of the data and of its square."""

    mean: Float[Array, ""]
    square: Float[Array, ""]


def moving_average(old: Statistics, new: Statistics, rate: Scalar) -> Statistics:
    """`(1 - rate) * old + rate * new` for two pytrees of one structure.

    Applied to a number that starts at 0 with `new = 1.0` it gives the `weight` that
    `debias` needs.

    Args:
      old: the state so far.
      new: the same statistics of one batch.
      rate: share of `new`, in [0, 1].

    Returns:
      The mixed state.
    """
    return jax.tree.map(lambda o, n: (1 - rate) * o + rate * n, old, new)


def debias(state: Statistics, weight: Float[Array, ""]) -> Statistics:
    """Statistics that started at 0, as if they had averaged only what they have seen.

    Args:
      state: statistics made by repeated `moving_average` from 0.
      weight: what the same averages of the number 1 give, `1 - (1 - rate)**updates`.

    Returns:
      `state / weight`, and zeros before the first update.

    Source: "Adam" (arXiv:1412.6980), section 3.
    """
    return jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-8), state)


def percentiles_init() -> Percentiles:
    """The state before any batch: zeros."""
    return Percentiles(jnp.zeros(()), jnp.zeros(()))


def percentiles_update(
    state: Percentiles,
    x: Float[Array, "..."],
    rate: Scalar = 0.01,
    low: float = 5.0,
    high: float = 95.0,
) -> Percentiles:
    """Mix the percentiles of one batch into the state.

    Args:
      state: the state so far.
      x: the batch, of any shape; percentiles interpolate linearly over all its entries.
      rate: share of the batch, in [0, 1].
      low: lower percentile, 0..100.
      high: upper percentile, 0..100.

    Returns:
      The new state; no gradient flows to `x`.

    Source: "Actor learning" in DreamerV3 (arXiv:2301.04104).
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    lo, hi = backend.percentile(x, low, high)
    return moving_average(state, Percentiles(lo, hi), rate)


def percentiles_scale(state: Percentiles, limit: float = 1.0) -> Float[Array, ""]:
    """What to divide by: `max(limit, hi - lo)`.

    Args:
      state: the running percentiles.
      limit: smallest scale, so that small data is never magnified by more than 1 / limit.

    Returns:
      The scale, in the units of the data.
    """
    return jnp.maximum(limit, state.hi - state.lo)


def moments_init() -> Moments:
    """The state before any batch: zeros."""
    return Moments(jnp.zeros(()), jnp.zeros(()))


def moments_update(state: Moments, x: Float[Array, "..."], rate: Scalar = 0.01) -> Moments:
    """Mix the mean and mean square of one batch into the state.

    Args:
      state: the state so far.
      x: the batch, of any shape.
      rate: share of the batch, in [0, 1].

    Returns:
      The new state; no gradient flows to `x`.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return moving_average(state, Moments(jnp.mean(x), jnp.mean(jnp.square(x))), rate)


def moments_scale(state: Moments, limit: float = 1e-8) -> Float[Array, ""]:
    """What to divide by: the standard deviation, at least `limit`.

    Args:
      state: the running moments, debiased or not.
      limit: smallest scale.

    Returns:
      The scale, in the units of the data.
    """
    variance = state.square - jnp.square(state.mean)
    return jnp.maximum(limit, jnp.sqrt(jnp.maximum(variance, 0.0)))


class Running(NamedTuple):
    """Number, mean and population variance of everything seen, per entry."""

    count: Float[Array, ""]
    mean: Float[Array, "..."]
    variance: Float[Array, "..."]


def running_init(shape: tuple[int, ...] = ()) -> Running:
    """The state before any batch: mean 0 and variance 1, which count for nothing."""
    return Running(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def running_update(
    state: Running,
    x: Num[Array, "N *shape"],
    weight: Float[Array, " N"],
    total: Callable[[Array], Array] = lambda sums: sums,
) -> Running:
    """Adds a batch to the statistics.

    Args:
      state: the statistics so far.
      x: the batch, of any size.
      weight: how often each entry counts, 0 for not at all.
      total: sums over the shards of a training, whose batches are added together.

    Returns:
      The new state, as if all batches had been one; unchanged if all weights are 0.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    each = weight.reshape(-1, *(1,) * (x.ndim - 1))
    off = wide(x) - state.mean[None]
    new = total(jnp.sum(weight))
    least = jnp.maximum(new, 1e-8)
    shift = total(jnp.sum(each * off, 0)) / least
    spread = total(jnp.sum(each * jnp.square(off - shift[None]), 0))
    count = state.count + new
    share = new / jnp.maximum(count, 1e-8)
    between = jnp.square(shift) * state.count * share
    variance = (state.variance * state.count + spread + between) / jnp.maximum(count, 1e-8)
    variance = jnp.where(count > 0, variance, state.variance)
    return Running(count, state.mean + shift * share, variance)


def running_normalize(
    state: Running, x: Num[Array, "*lead"], limit: float = 10.0
) -> Float[Array, "*lead"]:
    """`(x - mean) / sqrt(variance + 1e-8)`, clipped to -limit..limit.

    Args:
      state: the statistics.
      x: numbers whose last axes are those of the statistics.
      limit: largest magnitude of the result.
    """
    mean, variance = (prepend_axes(part, x.ndim) for part in (state.mean, state.variance))
    return jnp.clip((wide(x) - mean) / jnp.sqrt(variance + 1e-8), -limit, limit)
