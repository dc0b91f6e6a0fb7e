"""Convolutions of images and their gradients, as CPUs compute them fast.

Maps are (n, h, w, c), kernels (h, w, in, out). For CPUs XLA has a fast routine for one layout only,
without strides, and it needs many channels. Here gradients are brought into that layout, and the
pixels of a square become channels. All functions equal those of `plain` up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.types import Array, Float

Pads = tuple[tuple[int, int], ...]
# So few channels fill neither the vectors of a product nor its columns.
_FEW = 16


def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h w o"]:
    """Convolution with SAME padding.

    If there are few channels, the pixels of a 2x2 square become channels of a smaller map, and one
    convolution of that map makes the pixels of the output squares.
    """
    if _in_squares(x) and min(kernel.shape[2:]) <= _FEW:
        return _pixels(_convolve(_squares(x), *_for_squares(kernel)))
    return _convolve(x, kernel, _same(x, kernel))


@jax.custom_vjp
def convolve_strided(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of stride 2: what SAME padding is missing, the larger half comes after the map.

    Gradients of even maps are those of the convolution from squares of pixels, which has no stride.
    """
    return _conv(x, kernel, _same(x, kernel, 2), 2)


def _strided_forward(x, kernel):
    return convolve_strided(x, kernel), (x, kernel)


def _strided_backward(saved, grad):
    if _in_squares(saved[0]):
        same = lambda x, kernel: _convolve(_squares(x), *_for_squares(kernel, 2))  # noqa: E731
    else:
        same = lambda x, kernel: _conv(x, kernel, _same(x, kernel, 2), 2)  # noqa: E731
    return jax.vjp(same, *saved)[1](grad)


convolve_strided.defvjp(_strided_forward, _strided_backward)


def _in_squares(x: Array) -> bool:
    """Whether squares of a map are better convolved than the map."""
    return x.shape[1] % 2 == x.shape[2] % 2 == 0


def _same(x: Array, kernel: Array, stride: int = 1) -> Pads:
    short = [max(kernel.shape[0] - (n % stride or stride), 0) for n in x.shape[1:3]]
    return tuple((n // 2, n - n // 2) for n in short)


def convolve_pooled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`max_pool(convolve(x, kernel))`, of maps of even height and width.

    A few images at a time are convolved and pooled, so that what is pooled stays in the cache.
    """
    if kernel.shape[2] > _FEW:
        return _pooled(x, kernel, _same(x, kernel), False)
    return _pooled(x, *_for_squares(kernel), True)


def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve(upsample(x), kernel)`, of odd kernels.

    The doubled map is never made. Of a kernel's taps on it several meet the same pixel of the
    map itself, so that each of the four positions within a doubled pixel is a smaller
    convolution, with kernels that are sums of taps: of 5x5 taps 3x3 remain. They are added up in
    the type of `kernel`, which may be wider than that of `x`.
    """
    size = kernel.shape[0]
    merged, pads = _merged(kernel, (np.arange(2)[:, None] + np.arange(size) - size // 2) // 2)
    return _pixels(_convolve(x, merged.astype(x.dtype), pads))


def convolve_transposed(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of a map with the pixels of `x` at odd places and zeros between, of odd kernels.

    That map is never made, see `convolve_doubled`.
    """
    size, half = kernel.shape[0], kernel.shape[0] // 2
    merged, pads = _merged(kernel, (np.arange(2)[:, None] + np.arange(size) - half - 1) / 2)
    return _pixels(_convolve(x, merged, pads))


def _for_squares(kernel: Array, stride: int = 1) -> tuple[Array, Pads]:
    """`_merged`, from the 2x2 squares of a map to such squares or, with stride 2, to pixels."""
    size = kernel.shape[0]
    low = max(size - stride, 0) // 2
    return _merged(kernel, np.arange(2 // stride)[:, None] + np.arange(size) - low, 2)


def _merged(kernel: Array, place: np.ndarray, reads: int = 1) -> tuple[Array, Pads]:
    """The kernel of a convolution from squares of pixels to squares of pixels, and its pads.

    Args:
      kernel: (k, k, i, o).
      place: (makes, k), the pixel, counted from the first of its square, on which each tap falls
        for each output pixel of a square, in height as in width; between pixels there are zeros.
      reads: height and width of the squares that are read.

    Returns:
      Of (s, s, reads * reads * i, makes * makes * o).
    """
    meets = place[place % 1 == 0]
    before, after = int(-meets.min() + reads - 1) // reads, int(meets.max()) // reads
    pixels = np.arange(-reads * before, reads * (after + 1)).reshape(-1, reads)
    # taps[a, t, s, p]: at position a, tap t falls on pixel p of square s of the window.
    taps = (place[..., None, None] == pixels).astype(kernel.dtype)
    merged = jnp.einsum("atsp,buvq,tuio->svpqiabo", taps, taps, kernel)
    shape = (*merged.shape[:2], reads**2 * kernel.shape[2], len(place) ** 2 * kernel.shape[3])
    return merged.reshape(shape), ((before, after),) * 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, pads: Pads) -> Array:
    """A convolution of stride 1, whose gradients are convolutions in the layout that is fast.

    Inside a loop XLA runs those of automatic differentiation some ten times slower on a CPU.
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
    """Gradient to the map of a convolution."""
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    sides = zip(kernel.shape, pads, strict=False)
    return _conv(grad, flipped, tuple((k - 1 - low, k - 1 - high) for k, (low, high) in sides))


def _kernel_gradient(x: Array, grad: Array, pads: Pads) -> Array:
    """Gradient to the kernel of a convolution, as (i, h, w, o): of the maps with their gradients.

    Channels and batch change places.
    """
    return _conv(x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3), pads)


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
        # Equal maxima share.
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


def _conv(x: Array, kernel: Array, pads: Pads, stride: int = 1, dilation: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


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
