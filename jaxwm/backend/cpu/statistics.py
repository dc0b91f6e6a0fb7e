"""Maxima, percentiles and interpolation without the slow loops of XLA on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.backend.plain import interpolation_weights
from jaxwm.types import Array, Float, Int


def largest(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """The maximum over the last axis, which stays with size 1.

    Halves are compared as a whole, overlapping by one entry if need be.
    """
    while (size := x.shape[-1]) > 32:
        half = (size + 1) // 2
        x = jnp.maximum(x[..., :half], x[..., size - half :])
    return jnp.max(x, -1, keepdims=True)


def percentile(x: Float[Array, "..."], *wanted: float) -> Float[Array, " n"]:
    """Percentiles of all entries, interpolated linearly, without sorting.

    One NaN makes all of them NaN.
    """
    places = np.asarray(wanted) / 100 * (x.size - 1)
    below = np.floor(places).astype(int)
    lower, upper = _ranked(x.reshape(-1), np.stack([below, np.minimum(below + 1, x.size - 1)]))
    share = jnp.asarray(places - below, jnp.float32)
    mixed = lower * (1 - share) + upper * share
    return jnp.where(jnp.isnan(x).any(), jnp.nan, mixed)


def _ranked(x: Float[Array, " n"], ranks: np.ndarray) -> Float[Array, "*ranks"]:
    """The entries at some places of the sorted array.

    Floats become integers of the same order, and each result is found bit by bit, the highest
    first: a bit is set if no more than `rank` entries are smaller than the number with that bit.
    """
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    ordered = jnp.where(bits < sign, bits | sign, ~bits).reshape(*(1,) * ranks.ndim, -1)

    def extend(index: Array, found: Array) -> Array:
        longer = found | jnp.right_shift(sign, index.astype(jnp.uint32))
        smaller = jnp.sum(ordered < longer[..., None], -1)
        return jnp.where(smaller <= ranks, longer, found)

    found = jax.lax.fori_loop(0, 32, extend, jnp.zeros(ranks.shape, jnp.uint32))
    bits = jnp.where(found < sign, ~found, found ^ sign)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_vjp
def interpolate(
    x: Float[Array, "*batch n"], below: Int[Array, "*batch"], share: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """`(1 - share) * x[below] + share * x[below + 1]` along the last axis.

    Two entries are read, and the gradient is dense: XLA would scatter it entry by entry. There is
    no gradient to `share`.
    """
    lower, upper = (jnp.take_along_axis(x, i[..., None], -1)[..., 0] for i in (below, below + 1))
    return (1 - share) * lower + share * upper


def _interpolate_forward(x: Array, below: Array, share: Array) -> tuple[Array, tuple]:
    return interpolate(x, below, share), (below, share, x.shape[-1])


def _interpolate_backward(saved: tuple, grad: Array) -> tuple[Array, None, None]:
    below, share, size = saved
    return grad[..., None] * interpolation_weights(below, share, size), None, None


interpolate.defvjp(_interpolate_forward, _interpolate_backward)
