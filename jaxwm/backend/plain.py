"""Every operation of the backend in a few lines of jnp.

Accelerators run these definitions, and tests compare the fast versions with them. Maps are
(n, h, w, c), kernels of convolutions (k, k, in, out); rows have the batch first and features last.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.types import Array, Float, Int


def product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel`."""
    return x @ kernel


def block_product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "G block_inputs block_outputs"]
) -> Float[Array, "*lead outputs"]:
    """Multiplies each of G equal slices of the last axis by a kernel of its own."""
    blocks, _, outputs = kernel.shape
    grouped = x.reshape(*x.shape[:-1], blocks, -1)
    each = jnp.einsum("...gi,gio->...go", grouped, kernel)
    return each.reshape(*x.shape[:-1], blocks * outputs)


def scan(step: Callable[..., Any], params: Any, carry: Any, xs: Any) -> Any:
    """`jax.lax.scan` of `step(params, carry, x) -> carry, y`."""
    return jax.lax.scan(lambda carry, x: step(params, carry, x), carry, xs)


def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h w o"]:
    """Convolution with SAME padding."""
    return _convolve(x, kernel, "SAME")


def convolve_strided(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """Convolution of stride 2 with SAME padding, whose larger half comes after the map."""
    return _convolve(x, kernel, "SAME", stride=2)


def convolve_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"], stride: int = 2
) -> Float[Array, "n h2 w2 o"]:
    """Convolution without padding."""
    return _convolve(x, kernel, "VALID", stride)


def convolve_pooled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """The largest of each 2x2 square of `convolve`; equal maxima share the gradient."""
    y = convolve(x, kernel)
    n, h, w, c = y.shape
    return y.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with every pixel repeated in a 2x2 square."""
    return convolve(x.repeat(2, 1).repeat(2, 2), kernel)


def convolve_transposed(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with zeros between its pixels, which stand at odd places; odd k."""
    half = kernel.shape[0] // 2
    return _convolve(x, kernel, ((half + 1, half),) * 2, dilation=2)


def convolve_transposed_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k o c"]
) -> Float[Array, "n h2 w2 o"]:
    """Gradient of `convolve_valid` to its map: y[2i+u, 2j+v, o] += x[i, j, c] * kernel[u, v, o, c].

    Height and width become 2 * (side - 1) + k.
    """
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    pad = kernel.shape[0] - 1
    return _convolve(x, flipped, ((pad, pad),) * 2, dilation=2)


def _convolve(x: Array, kernel: Array, padding: Any, stride: int = 1, dilation: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def by_slices(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`, of a function that treats the entries of the first axis one by one."""
    return function(*arrays)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `jax.vmap` may batch."""
    return function


def percentile(x: Float[Array, "..."], *wanted: float) -> Float[Array, " n"]:
    """Percentiles of all entries, interpolated linearly; one NaN makes all of them NaN."""
    return jnp.percentile(x, jnp.asarray(wanted))


def largest(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """The maximum over the last axis, which stays with size 1."""
    return jnp.max(x, -1, keepdims=True)


def interpolate(
    x: Float[Array, "*batch n"], below: Int[Array, "*batch"], share: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """`(1 - share) * x[below] + share * x[below + 1]` along the last axis."""
    return jnp.sum(interpolation_weights(below, share, x.shape[-1]) * x, -1)


def interpolation_weights(
    below: Int[Array, "*batch"], share: Float[Array, "*batch"], size: int
) -> Float[Array, "*batch n"]:
    """`1 - share` at place `below`, `share` at the next one, and 0 elsewhere; NaN stays NaN."""
    offset = jnp.arange(size).reshape((1,) * below.ndim + (-1,)) - below[..., None]
    share = share[..., None]
    return jnp.where(offset == 0, 1 - share, jnp.where(offset == 1, share, 0 * share))
