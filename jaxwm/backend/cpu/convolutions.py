"""Convolutions of images, and their gradients, in the forms that XLA computes fast on CPUs.

XLA has one fast routine for convolutions on CPUs. It needs one layout and no strides, and few
channels leave it idle. So gradients are brought into that layout, and a square of pixels becomes
the channels of one pixel of a smaller map. Every function equals its plain definition up to
rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.backend import plain
from jaxwm.types import Array, Float

Pads = tuple[tuple[int, int], ...]
# With so few channels, squares of pixels are convolved faster than pixels.
FEW = 16


def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h w o"]:
    """Convolution with SAME padding, from 2x2 squares to 2x2 squares if there are few channels."""
    if _has_squares(x) and min(kernel.shape[2:]) <= FEW:
        return _pixels(_convolve(_squares(x), *_between_squares(kernel)))
    return _convolve(x, kernel, _same(x, kernel))


@jax.custom_vjp
def convolve_strided(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """Convolution of stride 2 with SAME padding; gradients are those of one from 2x2 squares."""
    return plain.convolve_strided(x, kernel)


def _strided_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    def from_squares(x: Array, kernel: Array) -> Array:
        return _convolve(_squares(x), *_from_squares(kernel, max(len(kernel) - 2, 0) // 2))

    same = from_squares if _has_squares(saved[0]) else plain.convolve_strided
    return jax.vjp(same, *saved)[1](grad)


convolve_strided.defvjp(
    lambda x, kernel: (convolve_strided(x, kernel), (x, kernel)), _strided_backward
)


def convolve_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"], stride: int = 2
) -> Float[Array, "n h2 w2 o"]:
    """Convolution without padding, from squares of `stride` pixels."""
    merged, _ = _from_squares(kernel, 0, stride)
    # The map is cut or filled up to the squares that the outputs read.
    sides = [(n - len(kernel)) // stride + len(merged) for n in x.shape[1:3]]
    edges = [(0, side * stride - n, 0) for side, n in zip(sides, x.shape[1:3], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return _convolve(_squares(x, stride), merged, ((0, 0),) * 2)


def convolve_pooled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """The largest of each 2x2 square of `convolve`, computed for a few images at a time."""
    if kernel.shape[2] > FEW:
        return _pooled(x, kernel, _same(x, kernel), False)
    return _pooled(x, *_between_squares(kernel), True)


def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with every pixel repeated in a 2x2 square, without making that map.

    Several taps of the kernel meet the same pixel of the small map. Each of the four positions in a
    doubled pixel is therefore a smaller convolution, whose taps are sums: 3x3 for a 5x5 kernel.
    """
    place = (np.arange(2)[:, None] + np.arange(len(kernel)) - len(kernel) // 2) // 2
    return _pixels(_convolve(x, *_merged(kernel, place)))


def convolve_transposed(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with zeros between its pixels, without making that map; odd k."""
    place = (np.arange(2)[:, None] + np.arange(len(kernel)) - len(kernel) // 2 - 1) / 2
    return _pixels(_convolve(x, *_merged(kernel, place)))


def convolve_transposed_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k o c"]
) -> Float[Array, "n h2 w2 o"]:
    """Transposed convolution of stride 2 without padding, from pixels to 2x2 squares."""
    place = (np.arange(2)[:, None] - np.arange(len(kernel))) / 2
    merged, ((before, _), _) = _merged(kernel.swapaxes(2, 3), place)
    y = _pixels(_convolve(x, merged, ((before, before),) * 2))
    height, width = (2 * (n - 1) + len(kernel) for n in x.shape[1:3])
    return y[:, :height, :width]


def _has_squares(x: Array) -> bool:
    return x.shape[1] % 2 == x.shape[2] % 2 == 0


def _same(x: Array, kernel: Array) -> Pads:
    short = kernel.shape[0] - 1
    return ((short // 2, short - short // 2),) * 2


def _between_squares(kernel: Array) -> tuple[Array, Pads]:
    """The kernel of `convolve` from 2x2 squares to 2x2 squares, and its pads."""
    size = len(kernel)
    return _merged(kernel, np.arange(2)[:, None] + np.arange(size) - (size - 1) // 2, 2)


def _from_squares(kernel: Array, low: int, stride: int = 2) -> tuple[Array, Pads]:
    """The kernel of a strided convolution from squares of `stride` pixels to pixels, and its pads.

    Args:
      kernel: (k, k, i, o).
      low: the padding before the map.
      stride: step of the convolution.
    """
    return _merged(kernel, np.arange(len(kernel))[None] - low, stride)


def _merged(kernel: Array, place: np.ndarray, reads: int = 1) -> tuple[Array, Pads]:
    """The kernel of a convolution from squares of pixels to squares of pixels, and its pads.

    Args:
      kernel: (k, k, i, o).
      place: (makes, k), the pixel on which each tap falls for each output pixel of a square, in
        height and in width alike. Pixels are counted from the first one of the square. Between
        pixels there are zeros.
      reads: height and width of the squares that are read.

    Returns:
      The kernel (s, s, reads * reads * i, makes * makes * o), and pads for as many output squares
      as input squares.
    """
    meets = place[place % 1 == 0]
    before, after = int(-meets.min() + reads - 1) // reads, int(meets.max()) // reads
    pixels = np.arange(-reads * before, reads * (after + 1)).reshape(-1, reads)
    # taps[a, t, s, p]: at output position a, tap t falls on pixel p of square s of the window.
    taps = (place[..., None, None] == pixels).astype(kernel.dtype)
    merged = jnp.einsum("atsp,buvq,tuio->svpqiabo", taps, taps, kernel)
    shape = (*merged.shape[:2], reads**2 * kernel.shape[2], len(place) ** 2 * kernel.shape[3])
    return merged.reshape(shape), ((before, after),) * 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, pads: Pads) -> Array:
    """A convolution of stride 1, whose gradients are convolutions in the fast layout.

    Inside a loop XLA takes some ten times longer for the gradients of automatic differentiation.
    """
    return _conv(x, kernel, pads)


def _convolve_forward(x, kernel, pads):
    return _conv(x, kernel, pads), (x, kernel)


def _convolve_backward(pads, saved, grad):
    x, kernel = saved
    zero = jnp.zeros((x.shape[-1], *kernel.shape[:2], grad.shape[-1]), grad.dtype)

    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _kernel_gradient(*images, pads), None

    total = jax.lax.scan(add, zero, (_chunks(x), _chunks(grad)))[0]
    return _map_gradient(grad, kernel, pads), total.transpose(1, 2, 0, 3)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _map_gradient(grad: Array, kernel: Array, pads: Pads) -> Array:
    """The gradient of a convolution to its map."""
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    sides = zip(kernel.shape, pads, strict=False)
    return _conv(grad, flipped, tuple((k - 1 - low, k - 1 - high) for k, (low, high) in sides))


def _kernel_gradient(x: Array, grad: Array, pads: Pads) -> Array:
    """The gradient of a convolution to its kernel, as (i, h, w, o): the maps with their gradients.

    Channels and batch change places.
    """
    return _conv(x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pooled(
    x: Float[Array, "n h w c"], kernel: Array, pads: Pads, squares: bool
) -> Float[Array, "n h2 w2 c2"]:
    """The largest of each 2x2 square of a convolution, for a few images at a time.

    The gradient keeps one byte per maximum, which says which of the four were largest. With
    `squares` the kernel is that of a convolution from squares to squares.
    """
    return _pooled_forward(x, kernel, pads, squares)[0]


def _pooled_forward(x, kernel, pads, squares):
    def largest(x: Array) -> tuple[Array, Array]:
        y = _conv(_squares(x) if squares else x, kernel, pads)
        parts = jnp.split(y if squares else _squares(y), 4, -1)
        most = functools.reduce(jnp.maximum, parts)
        bits = [(part == most).astype(jnp.uint8) << i for i, part in enumerate(parts)]
        return most, functools.reduce(jnp.bitwise_or, bits)

    most, where = jax.lax.map(largest, _chunks(x))
    return _joined(most, x.shape[0]), (x, kernel, where)


def _pooled_backward(pads, squares, saved, grad):
    x, kernel, where = saved
    size, _, inputs, outputs = kernel.shape
    zero = jnp.zeros((inputs, size, size, outputs), grad.dtype)

    def add(total: Array, images: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, where, grad = images
        # Equal maxima share the gradient.
        share = grad / jax.lax.population_count(where).astype(grad.dtype)
        grad = jnp.concatenate([jnp.where(where & (1 << i), share, 0) for i in range(4)], -1)
        if squares:
            grad_x = _pixels(_map_gradient(grad, kernel, pads))
            return total + _kernel_gradient(_squares(x), grad, pads), grad_x
        grad = _pixels(grad)
        return total + _kernel_gradient(x, grad, pads), _map_gradient(grad, kernel, pads)

    total, grad_x = jax.lax.scan(add, zero, (_chunks(x), where, _chunks(grad)))
    return _joined(grad_x, x.shape[0]), total.transpose(1, 2, 0, 3)


_pooled.defvjp(_pooled_forward, _pooled_backward)


def _chunks(x: Array, size: int = 16) -> Array:
    """(n, ...) to chunks of at most `size` images, which fit the cache; filled up with zeros."""
    count = -(-x.shape[0] // size)
    if missing := -x.shape[0] % count:
        x = jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])
    return x.reshape(count, -1, *x.shape[1:])


def _joined(chunks: Array, count: int) -> Array:
    """The inverse of `_chunks`, for `count` images."""
    return chunks.reshape(-1, *chunks.shape[2:])[:count]


def _conv(x: Array, kernel: Array, pads: Pads) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=numbers)


def _squares(x: Float[Array, "n h w c"], side: int = 2) -> Float[Array, "n h2 w2 c2"]:
    """The pixels of each square of `side` x `side` one after the other, as channels."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // side, w // side, side * side * c)


def _pixels(x: Float[Array, "n h w c4"]) -> Float[Array, "n h2 w2 c"]:
    """The inverse of `_squares` of side 2."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * h, 2 * w, c // 4)
