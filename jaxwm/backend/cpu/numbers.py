"""Order statistics and interpolation without sorting, scattering or slow reductions."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.backend.plain import interpolation_weights
from jaxwm.types import Array, Float, Int


def largest(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """The maximum over the last axis, by comparing halves, which XLA vectorises."""
    while (size := x.shape[-1]) > 32:
        half = (size + 1) // 2  # the halves of an odd size overlap by one
        x = jnp.maximum(x[..., :half], x[..., size - half :])
    return jnp.max(x, -1, keepdims=True)


def percentile(x: Float[Array, "..."], *wanted: float) -> Float[Array, " n"]:
    """Percentiles of all entries from order statistics that are found without sorting."""
    places = np.asarray(wanted) / 100 * (x.size - 1)
    below = np.floor(places).astype(int)
    lower, upper = _ranked(x.reshape(-1), np.stack([below, np.minimum(below + 1, x.size - 1)]))
    share = jnp.asarray(places - below, jnp.float32)
    mixed = lower * (1 - share) + upper * share
    return jnp.where(jnp.isnan(x).any(), jnp.nan, mixed)


def _ranked(x: Float[Array, " n"], ranks: np.ndarray) -> Float[Array, "*ranks"]:
    """The numbers at these places of the sorted array.

    Finds each number bit by bit, the highest first, in integers that are ordered like the floats.
    """
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    ordered = jnp.where(bits < sign, bits | sign, ~bits)

    def extend(index: Array, found: Array) -> Array:
        longer = found | jnp.right_shift(sign, index.astype(jnp.uint32))
        smaller = jnp.sum(ordered[(None,) * found.ndim] < longer[..., None], -1)
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
