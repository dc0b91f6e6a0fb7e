"""Convolutions of images, with their gradients, in ways that are fast on CPUs too.

Maps are (n, h, w, c), kernels (h, w, in, out). XLA has a fast routine for CPUs in one layout only,
and few channels leave it idle: `convolve` brings the gradients into that layout, `convolve_pooled`
and `convolve_doubled` make channels of pixels. All are plain convolutions, to rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.types import Array, Float

Pads = tuple[tuple[int, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, "n h w c"], kernel: Array, stride: int, pads: Pads, dilation: int = 1
) -> Float[Array, "n h2 w2 c2"]:
    """Convolution of NHWC maps by an HWIO kernel; `dilation` puts zeros between pixels.

    `pads` are the zeros before and after each of h and w; an output has
    `((h - 1) * dilation + 1 + pads - kernel) // stride + 1` pixels, likewise in w.
    On CPU the gradients are convolutions in the one layout that XLA has a fast routine for:
    inside a loop it runs the ones of automatic differentiation some ten times slower.
    """
    return _conv(x, kernel, stride, pads, dilation, 1)


def _convolve_forward(x, kernel, stride, pads, dilation):
    return _conv(x, kernel, stride, pads, dilation, 1), (x, kernel)


def _convolve_backward(stride, pads, dilation, saved, grad):
    x, kernel = saved
    if jax.default_backend() != "cpu":
        transpose = jax.vjp(lambda x, k: _conv(x, k, stride, pads, dilation, 1), x, kernel)[1]
        return transpose(grad)
    to_x, to_kernel = _gradients(x.shape, kernel, grad.shape, stride, pads, dilation)
    zero = jnp.zeros((x.shape[-1], *kernel.shape[:2], grad.shape[-1]), grad.dtype)

    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        return total + to_kernel(*images), None

    grad_kernel = jax.lax.scan(add, zero, (_chunks(x), _chunks(grad)))[0]
    return to_x(grad), grad_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _gradients(
    x: tuple[int, ...], kernel: Array, y: tuple[int, ...], stride: int, pads: Pads, dilation: int
) -> tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]:
    """Of convolutions from shape `x` to `y`: gradient to map, map and gradient to (i, h, w, o)."""
    to_x, to_kernel = [], []
    for axis in (1, 2):
        size = kernel.shape[axis - 1]
        wide_x = (x[axis] - 1) * dilation + 1
        wide_grad = (y[axis] - 1) * stride + 1
        low = pads[axis - 1][0]
        before = size - 1 - low
        to_x.append((before, wide_x + size - 1 - wide_grad - before))
        to_kernel.append((low, size - 1 + wide_grad - wide_x - low))
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)

    def correlate(x: Array, grad: Array) -> Array:
        # Channels and batch change places: the correlation of the maps with their gradients.
        maps, windows = x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3)
        return _conv(maps, windows, 1, to_kernel, dilation, stride)

    return lambda grad: _conv(grad, flipped, dilation, to_x, stride, 1), correlate


def convolve_pooled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`max_pool(convolve(x, kernel))` with SAME padding, of maps of even height and width.

    On CPU a few images at a time are convolved and pooled, so that what is pooled stays in the
    cache. Few channels fill neither the vectors of a product nor its columns: for them the pixels
    of a 2x2 square become channels of a smaller map, from which one convolution makes those of an
    output square, with 1.4 times the operations in half the time.
    """
    size, inputs = kernel.shape[1:3]
    low, high = (size - 1) // 2, size // 2
    pads = ((low, high),) * 2
    if jax.default_backend() != "cpu":
        return max_pool(convolve(x, kernel, 1, pads))
    if inputs > 16:
        return _pooled(x, kernel, pads, False)
    before, after = (low + 1) // 2, (high + 1) // 2
    pixels = np.arange(2 * (before + 1 + after)).reshape(-1, 2)
    # taps[a, t, s, p]: at position a, tap t falls on pixel p of square s of the window.
    place = np.arange(2)[:, None] + np.arange(size) - low + 2 * before
    taps = (place[..., None, None] == pixels).astype(kernel.dtype)
    merged = jnp.einsum("atsp,buvq,tuio->svpqiabo", taps, taps, kernel)
    merged = merged.reshape(*merged.shape[:2], 4 * inputs, -1)
    return _pooled(x, merged, ((before, after),) * 2, True)


def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve(upsample(x), kernel)` with SAME padding, of odd kernels.

    The doubled map is never made. Of a kernel's taps on it several meet the same pixel of the
    map itself, so that each of the four positions within a doubled pixel is a smaller
    convolution, with kernels that are sums of taps: of 5x5 taps 3x3 remain. They are added up in
    the type of `kernel`, which may be wider than that of `x`.
    """
    size = kernel.shape[0]
    half = size // 2
    reach = (half + 1) // 2
    # taps[a, s, t]: at position a, tap t of the kernel falls on pixel s of the window.
    place = (np.arange(2)[:, None] + np.arange(size) - half) // 2 + reach
    taps = (place[:, None] == np.arange(2 * reach + 1)[:, None]).astype(kernel.dtype)
    merged = jnp.einsum("ast,buv,tvio->suiabo", taps, taps, kernel)
    merged = merged.reshape(*merged.shape[:3], -1).astype(x.dtype)
    return _pixels(convolve(x, merged, 1, ((reach, reach),) * 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pooled(
    x: Float[Array, "n h w c"], kernel: Array, pads: Pads, squares: bool
) -> Float[Array, "n h2 w2 c2"]:
    """The largest of each 2x2 square of a convolution, a few images at a time.

    Which of the four were largest is kept in a byte, and what they were largest of is not. With
    `squares` the kernel is that of a convolution from squares to squares.
    """
    return _pooled_forward(x, kernel, pads, squares)[0]


def _pooled_forward(x, kernel, pads, squares):
    def largest(x: Array) -> tuple[Array, Array]:
        y = _conv(_squares(x) if squares else x, kernel, 1, pads, 1, 1)
        parts = jnp.split(y if squares else _squares(y), 4, -1)
        most = functools.reduce(jnp.maximum, parts)
        bits = [(part == most).astype(jnp.uint8) << i for i, part in enumerate(parts)]
        return most, functools.reduce(jnp.bitwise_or, bits)

    most, where = jax.lax.map(largest, _chunks(x))
    return _joined(most, x.shape[0]), (x, kernel, where)


def _pooled_backward(pads, squares, saved, grad):
    x, kernel, where = saved
    read = jax.eval_shape(_squares, x).shape if squares else x.shape
    to_x, to_kernel = _gradients(read, kernel, read, 1, pads, 1)
    zero = jnp.zeros((read[-1], *kernel.shape[:2], kernel.shape[-1]), grad.dtype)

    def add(total: Array, images: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, where, grad = images
        # Equal maxima share.
        share = grad / jax.lax.population_count(where).astype(grad.dtype)
        grad = jnp.concatenate([jnp.where(where & (1 << i), share, 0) for i in range(4)], -1)
        if squares:
            return total + to_kernel(_squares(x), grad), _pixels(to_x(grad))
        grad = _pixels(grad)
        return total + to_kernel(x, grad), to_x(grad)

    total, grad_x = jax.lax.scan(add, zero, (_chunks(x), where, _chunks(grad)))
    return _joined(grad_x, x.shape[0]), total.transpose(1, 2, 0, 3)


_pooled.defvjp(_pooled_forward, _pooled_backward)


def _chunks(x: Array, size: int = 16) -> Array:
    """(n, ...) to chunks of at most `size`, filled up with zeros: so many images fit the cache.

    On a CPU the gradient of a kernel then takes a third to a tenth of the time.
    """
    count = -(-x.shape[0] // size)
    if missing := -x.shape[0] % count:
        x = jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])
    return x.reshape(count, -1, *x.shape[1:])


def _joined(chunks: Array, count: int) -> Array:
    """What `_chunks` cut of so many images."""
    return chunks.reshape(-1, *chunks.shape[2:])[:count]


def _conv(x: Array, kernel: Array, stride: int, pads: Any, dilation: int, spread: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        lhs_dilation=(dilation, dilation),
        rhs_dilation=(spread, spread),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Maximum over 2x2 squares; equal maxima share the gradient."""
    return functools.reduce(jnp.maximum, _corners(x))


def _max_pool_forward(x):
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(saved, grad):
    # As automatic differentiation of a maximum has it, without its reductions over squares.
    x, y = saved
    share = grad / sum((corner == y).astype(grad.dtype) for corner in _corners(x))
    return (jnp.where(x == upsample(y), upsample(share), 0),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _corners(x: Array) -> list[Array]:
    """The four pixels of each 2x2 square, each (n, h / 2, w / 2, c)."""
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _squares(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c4"]:
    """The four pixels of each 2x2 square one after the other, as channels."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // 2, w // 2, 4 * c)


def _pixels(x: Float[Array, "n h w c4"]) -> Float[Array, "n h2 w2 c"]:
    """The inverse of `_squares`."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * h, 2 * w, c // 4)


def upsample(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Nearest-neighbour doubling of height and width."""
    n, h, w, c = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
    return wide.reshape(n, 2 * h, 2 * w, c)
