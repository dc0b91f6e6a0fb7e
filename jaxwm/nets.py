"""Layers: linear, block-linear, RMS norm, convolutions and stacks of them.

Every layer is a flax linen module with explicit input sizes, used through the pure `init` and
`apply`. Parameters are float32; inputs and parameters are cast to `dtype` at use. The order in
a stack is linear (or convolution, then pooling), RMS norm, SiLU. Initialisers and norms follow
DreamerV3 (arXiv:2301.04104).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from jaxwm import compiler
from jaxwm.types import Array, Float

silu = nn.silu


def truncated_normal_in(fan_in: int, scale: float = 1.0) -> Callable[..., Array]:
    """Truncated normal at two deviations with standard deviation `scale * sqrt(1 / fan_in)`.

    The factor 1.1368 undoes the shrinking of the variance by the truncation.
    """

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        if scale == 0.0:
            return jnp.zeros(shape, dtype)
        draw = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        return draw * (1.1368 * fan_in**-0.5 * scale)

    return init


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-4) * scale` over the axis of features, computed in float32."""

    size: int
    axis: int = -1

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        scale = self.param("scale", nn.initializers.ones, (self.size,))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), self.axis, keepdims=True) + 1e-4)
        return (wide * inverse * _over(scale, wide, self.axis)).astype(x.dtype)


def multiply(left: Array, right: Array, dtype: Any = None) -> Array:
    """`left @ right`, as `dtype` if one is given.

    Where `compiler.halves` says so, the factors are rounded to bfloat16 and summed in float32.
    """
    dtype = dtype or jnp.result_type(left, right)
    if not compiler.halves():
        return jnp.matmul(left, right, preferred_element_type=dtype)
    left, right = _half(left), _half(right)
    product = jnp.matmul(left, right, precision="default", preferred_element_type=jnp.float32)
    # Of a product behind a barrier no other order is made: XLA would not multiply halves then.
    return jax.lax.optimization_barrier(product).astype(dtype)


def halved(x: Array) -> Array:
    """`x` as `multiply` reads it: where products are of halves, the bits (uint16) of its half.

    For what is kept to be multiplied only. It is rounded to bfloat16, halfway cases away from zero,
    and has no derivative.
    """
    if not compiler.halves() or x.dtype == jnp.uint16:
        return x
    # For a plain conversion LLVM makes vectors half as long, of what is fused with it too.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return ((bits + jnp.uint32(0x8000)) >> 16).astype(jnp.uint16)


def _half(x: Array) -> Array:
    # XLA on a CPU multiplies only halves that are not turned, and a row is no other's transpose.
    row = jax.lax.optimization_barrier(halved(x).ravel())
    return jax.lax.bitcast_convert_type(row, jnp.bfloat16).reshape(x.shape)


class Sink(NamedTuple):
    """What the gradient of a kernel is made of, of every step of a loop."""

    x: Float[Array, "steps *blocks inputs N"]
    grad: Float[Array, "steps *blocks outputs N"]


class Kernel(NamedTuple):
    """A kernel and its transpose, both in memory, for products with features first.

    Made before a loop, they spare every step the transposition that the product or its gradient
    would need: on a CPU that takes most of the time of a product with few columns.
    """

    plain: Float[Array, "*blocks inputs outputs"]  # float32: gradients add up in it
    turned: Float[Array, "*blocks outputs inputs"]  # compute type
    sink: Sink | None = None  # of one step; its cotangent takes the kernel's place


def kernel_of(plain: Float[Array, "*blocks inputs outputs"], dtype: str) -> Kernel:
    """A kernel with its transpose in the compute type; gradients reach it through `plain`."""
    turned = jax.lax.stop_gradient(jnp.swapaxes(plain.astype(dtype), -1, -2))
    # Without the barrier the compiler takes the transposition back into the loop.
    return Kernel(plain, jax.lax.optimization_barrier(turned))


@jax.custom_vjp
def columns(
    kernel: Kernel, x: Float[Array, "*blocks inputs N"]
) -> Float[Array, "*blocks outputs N"]:
    """`kernel.T @ x`: a linear map with features first and the batch last."""
    return _multiply(kernel, kernel.turned, kernel.plain, x)


def _columns_forward(kernel, x):
    return _multiply(kernel, kernel.turned, kernel.plain, x), (kernel, x)


def _columns_backward(saved, grad):
    kernel, x = saved
    none: Any = None  # no gradient at all: zeros would be added up in every step
    grad_x = _multiply(kernel, kernel.plain, kernel.turned, grad)
    if kernel.sink is not None:
        return Kernel(none, none, Sink(x, grad)), grad_x
    return Kernel(multiply(x, grad.swapaxes(-1, -2), kernel.plain.dtype), none), grad_x


columns.defvjp(_columns_forward, _columns_backward)


def _multiply(kernel: Kernel, left: Array, right: Array, x: Array) -> Array:
    """`left @ x`, of a kernel's matrix that lies in memory transposed too, as `right`."""
    if not in_rows(kernel, x):
        return multiply(left.astype(x.dtype), x)
    # A CPU lays the left factor out anew, which for few columns takes longer than to multiply.
    return rowwise(multiply(x.swapaxes(-1, -2), right.astype(x.dtype)).swapaxes(-1, -2))


def in_rows(kernel: Kernel, x: Float[Array, "*blocks inputs N"]) -> bool:
    """Whether `columns` computes rows instead: on a CPU, of few columns in a loop of several steps.

    A single step keeps the order of its sums, and so its bits, whatever else is computed with it.
    """
    # XLA 0.10 crashes where blocks of less than 4 features are to be rows.
    large = kernel.sink is not None and min(kernel.plain.shape[-2:]) >= 8
    return jax.default_backend() == "cpu" and large and x.shape[-1] <= 16


def rowwise(x: Float[Array, "*blocks _ N"]) -> Float[Array, "*blocks _ N"]:
    """`x`, of which the compiler computes rows: a CPU makes no vectors of few columns."""
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def sinks(kernels: Any, steps: int, count: int) -> Any:
    """A sink for each of some kernels, for a loop of so many steps over `count` columns.

    A loop that multiplies with `with_sinks(kernels, sinks)` hands its gradient what the gradients
    of the kernels are made of, and these are products of all steps at once: otherwise every step
    would add to them, which for large kernels means to read and write more than it multiplies. A
    single step has none.
    """

    def each(kernel: Kernel) -> Sink | None:
        return _sink(kernel.plain, kernel.turned.dtype, steps, count) if steps > 1 else None

    return jax.tree.map(each, kernels, is_leaf=_is_kernel)


def with_sinks(kernels: Any, sinks: Any) -> Any:
    """Kernels of one step of a loop, with that step's part of their sinks."""
    join = lambda kernel, sink: kernel._replace(sink=sink)  # noqa: E731
    return jax.tree.map(join, kernels, sinks, is_leaf=_is_kernel)


def _is_kernel(x: Any) -> bool:
    return isinstance(x, Kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sink(plain: Array, dtype: Any, steps: int, count: int) -> Sink:
    *blocks, inputs, outputs = plain.shape
    shape = (steps, *blocks)
    return Sink(
        jnp.zeros((*shape, inputs, count), dtype), jnp.zeros((*shape, outputs, count), dtype)
    )


def _sink_backward(dtype, steps, count, saved, full):
    # The products of all steps lie side by side, as one product's sums.
    x, grad = (jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1) for y in full)
    return (multiply(x, grad.swapaxes(-1, -2), jnp.float32),)


_sink.defvjp(lambda plain, *sizes: (_sink(plain, *sizes), None), _sink_backward)


@jax.custom_vjp
def product(
    x: Num[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel`, whose gradients are fast on CPU too; it has no forward-mode derivative."""
    return multiply(x, kernel, kernel.dtype)


def _product_backward(saved, grad):
    x, kernel = saved
    inputs, outputs = kernel.shape
    rows, grads = x.reshape(-1, inputs), grad.reshape(-1, outputs)
    # Of the two factors the routines of a CPU turn the left one, which should be the smaller: with
    # 640 inputs and 64 outputs the gradient of the kernel takes 0.4 of the time then. The barrier
    # keeps the compiler from swapping them.
    if outputs < inputs:
        grad_kernel = jax.lax.optimization_barrier(multiply(grads.T, rows, kernel.dtype)).T
    else:
        grad_kernel = multiply(rows.T, grads, kernel.dtype)
    # What `halved` has made is not learned from.
    grad_x = None if x.dtype == jnp.uint16 else multiply(grad, kernel.T, x.dtype)
    return grad_x, grad_kernel


product.defvjp(
    lambda x, kernel: (multiply(x, kernel, kernel.dtype), (x, kernel)), _product_backward
)


@jax.custom_vjp
def recall(
    known: Float[Array, "*lead outputs"],
    x: Num[Array, "*lead inputs"],
    kernel: Float[Array, "inputs outputs"],
) -> Float[Array, "*lead outputs"]:
    """`known`, which is `product(x, kernel)` from before, with the gradients of computing it."""
    return known


recall.defvjp(
    lambda known, x, kernel: (known, (x, kernel)),
    lambda saved, grad: (None, *_product_backward(saved, grad)),
)


def factor(x: Array, dtype: str) -> Array:
    """`x` as `product` takes it: in the compute type, or as `halved` has it."""
    return x if x.dtype == jnp.uint16 else x.astype(dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`; `rows` applies a slice of the input rows alone.

    Splitting a product by rows lets what does not depend on a scan's carry be computed for
    all steps at once, outside the scan.
    """

    inputs: int
    outputs: int
    scale: float = 1.0
    dtype: str = "float32"

    def setup(self):
        init = truncated_normal_in(self.inputs, self.scale)
        self.kernel = self.param("kernel", init, (self.inputs, self.outputs))
        self.bias = self.param("bias", nn.initializers.zeros, (self.outputs,))

    def __call__(self, x: Num[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        if self.has_variable("joint", "product"):  # see `abreast`
            known = self.get_variable("joint", "product")
        elif self.has_variable("products", "product"):
            known = self.get_variable("products", "product")
            known = recall(known, factor(x, self.dtype), self.kernel.astype(self.dtype))
        else:
            known = self.rows(x, 0)
        if self.is_mutable_collection("products"):
            self.put_variable("products", "product", known)
        return self.add_bias(known)

    def laid_out(self, size: int) -> Kernel:
        """The first `size` rows, for `columns`."""
        return kernel_of(self.kernel[:size], self.dtype)

    def rows(self, x: Num[Array, "*lead part"], start: int) -> Float[Array, "*lead outputs"]:
        """`x @ kernel[start : start + part]`, without the bias."""
        kernel = self.kernel[start : start + x.shape[-1]]
        return product(factor(x, self.dtype), kernel.astype(self.dtype))

    def columns(self, x: Float[Array, "inputs N"]) -> Float[Array, "N outputs"]:
        """`x.T @ kernel`, without the bias."""
        product = columns(self.laid_out(self.inputs), x.astype(self.dtype))
        # The barrier keeps the compiler from transposing the larger x instead.
        return jax.lax.optimization_barrier(product).T

    def add_bias(self, x: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
        return x + _over(self.bias.astype(self.dtype), x, axis)


class BlockLinear(nn.Module):
    """`blocks` independent linear maps over equal contiguous slices of the input.

    The fan-in of the initialiser is the full input size, as in the reference, so kernels start
    smaller by `sqrt(blocks)` than their own inputs would ask for.
    """

    inputs: int
    outputs: int
    blocks: int = 8
    dtype: str = "float32"

    def setup(self):
        shape = (self.blocks, self.inputs // self.blocks, self.outputs // self.blocks)
        self.kernel = self.param("kernel", truncated_normal_in(self.inputs), shape)
        self.bias = self.param("bias", nn.initializers.zeros, (self.outputs,))

    def __call__(self, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        grouped = x.reshape(*x.shape[:-1], self.blocks, -1)
        flat = self.rows(grouped, 0).reshape(*x.shape[:-1], self.outputs)
        return self.add_bias(flat)

    def rows(self, x: Float[Array, "*lead G part"], start: int) -> Float[Array, "*lead G out"]:
        """Each block's `x[..., g, :] @ kernel[g, start : start + part]`, without the bias."""
        kernel = self.kernel[:, start : start + x.shape[-1]]
        return jnp.einsum("...gi,gio->...go", x.astype(self.dtype), kernel.astype(self.dtype))

    def laid_out(self, size: int) -> Kernel:
        """Each block's first `size` rows, for `columns`."""
        return kernel_of(self.kernel[:, :size], self.dtype)

    def shared(self, start: int, size: int) -> Float[Array, "size outputs"]:
        """Rows for an input that every block reads, as the kernel of one dense product."""
        rows = self.kernel[:, start : start + size].transpose(1, 0, 2)
        return rows.reshape(size, self.outputs)

    def add_bias(self, x: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
        return x + _over(self.bias.astype(self.dtype), x, axis)


class MLP(nn.Module):
    """`layers` times linear, RMS norm, SiLU."""

    inputs: int
    units: int
    layers: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, features_first: bool = False) -> Float[Array, "*lead units"]:
        """Of rows (..., inputs), or of columns (inputs, N) if `features_first`."""
        size = self.inputs
        for index in range(self.layers):
            linear = Linear(size, self.units, dtype=self.dtype, name=f"linear{index}")
            turned = features_first and index == 0
            x = linear.add_bias(linear.columns(x)) if turned else linear(x)
            x = silu(RMSNorm(self.units, name=f"norm{index}")(x))
            size = self.units
        return x


class Heads(nn.Module):
    """An MLP and one linear output per name: (..., inputs) to {name: (..., size)}."""

    inputs: int
    units: int
    layers: int
    outputs: Mapping[str, int]
    scale: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Num[Array, "*lead inputs"]) -> dict[str, Array]:
        x = MLP(self.inputs, self.units, self.layers, self.dtype, name="mlp")(x)
        return {
            name: Linear(self.units, size, self.scale, self.dtype, name=name)(x)
            for name, size in self.outputs.items()
        }


class Conv(nn.Module):
    """Convolution of NHWC maps with SAME padding and a bias."""

    inputs: int
    outputs: int
    kernel: int = 5
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        kernel, bias = _conv_params(self)
        # SAME padding: what is missing for whole strides, the larger half after the map.
        short = [max(self.kernel - (n % self.stride or self.stride), 0) for n in x.shape[1:3]]
        pads = tuple((n // 2, n - n // 2) for n in short)
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, pads)
        return x + _over(bias.astype(self.dtype), x)


class PooledConv(nn.Module):
    """`max_pool` of `Conv`: (n, h, w, c) to (n, h / 2, w / 2, outputs).

    On CPU a few images at a time are convolved and pooled, so that what is pooled stays in the
    cache. Few channels fill neither the vectors of a product nor its columns: for them the pixels
    of a 2x2 square become channels of a smaller map, from which one convolution makes those of an
    output square, with 1.4 times the operations in half the time.
    """

    inputs: int
    outputs: int
    kernel: int = 5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        kernel, bias = _conv_params(self)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        low, high = (self.kernel - 1) // 2, self.kernel // 2
        pads = ((low, high),) * 2
        if jax.default_backend() != "cpu":
            x = max_pool(convolve(x, kernel, 1, pads))
        elif self.inputs > 16:
            x = _pooled(x, kernel, pads, False)
        else:
            before, after = (low + 1) // 2, (high + 1) // 2
            pixels = np.arange(2 * (before + 1 + after)).reshape(-1, 2)
            # taps[a, t, s, p]: at position a, tap t falls on pixel p of square s of the window.
            place = np.arange(2)[:, None] + np.arange(self.kernel) - low + 2 * before
            taps = (place[..., None, None] == pixels).astype(kernel.dtype)
            merged = jnp.einsum("atsp,buvq,tuio->svpqiabo", taps, taps, kernel)
            merged = merged.reshape(*merged.shape[:2], 4 * self.inputs, -1)
            x = _pooled(x, merged, ((before, after),) * 2, True)
        return x + _over(bias.astype(self.dtype), x)


class UpsampleConv(nn.Module):
    """`Conv` of the nearest-neighbour doubling: (n, h, w, c) to (n, 2h, 2w, outputs).

    The doubled map is never made. Of a kernel's taps on it several meet the same pixel of the
    map itself, so that each of the four positions within a doubled pixel is a smaller
    convolution, with kernels that are sums of taps: of 5x5 taps 3x3 remain.
    """

    inputs: int
    outputs: int
    kernel: int = 5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        kernel, bias = _conv_params(self)
        half = self.kernel // 2
        reach = (half + 1) // 2
        # taps[a, s, t]: at position a, tap t of the kernel falls on pixel s of the window.
        place = (np.arange(2)[:, None] + np.arange(self.kernel) - half) // 2 + reach
        taps = (place[:, None] == np.arange(2 * reach + 1)[:, None]).astype(np.float32)
        merged = jnp.einsum("ast,buv,tvio->suiabo", taps, taps, kernel)
        merged = merged.reshape(*merged.shape[:3], -1).astype(self.dtype)
        x = convolve(x.astype(self.dtype), merged, 1, ((reach, reach),) * 2)
        return _pixels(x) + bias.astype(self.dtype)[None, None, None]


class ConvTranspose(nn.Module):
    """Transposed convolution of stride 2: (n, h, w, c) to (n, 2h, 2w, outputs).

    Input pixels stand at the odd positions of a map of zeros, which is then convolved with
    stride 1.
    """

    inputs: int
    outputs: int
    kernel: int = 5
    stride: int = 2
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        kernel, bias = _conv_params(self)
        half = self.kernel // 2
        pads = ((half + self.stride - 1, half),) * 2
        kernel = kernel.astype(self.dtype)
        x = convolve(x.astype(self.dtype), kernel, 1, pads, self.stride)
        return x + _over(bias.astype(self.dtype), x)


Pads = tuple[tuple[int, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, "n h w c"], kernel: Array, stride: int, pads: Pads, dilation: int = 1
) -> Float[Array, "n h2 w2 c2"]:
    """Convolution of NHWC maps by an HWIO kernel; `dilation` puts zeros between pixels.

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


def _conv_params(module: Conv | PooledConv | ConvTranspose | UpsampleConv) -> tuple[Array, Array]:
    shape = (module.kernel, module.kernel, module.inputs, module.outputs)
    init = truncated_normal_in(module.kernel * module.kernel * module.inputs)
    kernel = module.param("kernel", init, shape)
    bias = module.param("bias", nn.initializers.zeros, (module.outputs,))
    return kernel, bias


def keep_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which a gradient keeps products and sums alone and computes the rest again.

    On CPU only, where writing to memory costs more than most of what is written. Sums and maxima
    take little memory and are slow.
    """
    if jax.default_backend() != "cpu":
        return function

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in ("dot_general", "reduce_sum", "reduce_max")

    # Inside a scan nothing could be merged with what is computed again.
    return jax.checkpoint(function, policy=kept, prevent_cse=False)


def sliced(size: int) -> bool:
    """Whether slices of so many numbers are better computed one after the other than at once."""
    return jax.default_backend() == "cpu" and size >= 2**16


def spare_columns(count: int) -> int:
    """Columns to add to `count` so that products with features first do not stumble on a CPU.

    Rows of so many numbers that their distance is a multiple of 1 KiB fall on the same few sets of
    the cache, and push one another out of it: products then take up to twice the time.
    """
    return 16 if jax.default_backend() == "cpu" and count % 256 == 0 else 0


def by_slices(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`; on CPU, where slices are large, one after the other.

    What is computed in between then stays in the cache.
    """
    if not sliced(max(x[0].size for x in jax.tree.leaves(arrays))):
        return function(*arrays)
    return jax.lax.map(keep_products(lambda slices: function(*slices)), arrays)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `jax.vmap` on a CPU has compute one member after the other.

    What a member computes in between then stays in the cache. The function may hold no traced
    values and no collectives: it takes all that differs between members as arguments.
    """
    if jax.default_backend() != "cpu":
        return function
    return jax.custom_batching.sequential_vmap(function)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *arrays)` for many rows, of which a gradient keeps nothing.

    It is computed again, some of the rows at a time, so that what lies between takes little memory.
    """

    def by_parts(params: Any, *arrays: Any) -> Any:
        rows = jax.tree.leaves(arrays)[0].shape[0]
        parts = math.gcd(rows, 16)
        cut = jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), arrays)
        out = jax.lax.map(jax.checkpoint(lambda part: function(params, *part)), cut)
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)

    return by_parts


def _over(vector: Array, like: Array, axis: int = -1) -> Array:
    """A vector along one axis of `like`, with its rank: rank promotion is an error in tests."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return vector.reshape(shape)


def call(module: nn.Module, method: str = "__call__") -> Callable[..., Any]:
    """`(params, *args) -> output` of one method of a module."""
    bound = functools.partial(module.apply, method=method)
    return lambda params, *args: bound({"params": params}, *args)


def remembering(module: nn.Module) -> Callable[..., tuple[Any, Any]]:
    """`(params, *args) -> output, products`, with the products of all `Linear` layers.

    Given to `recalling`, with the same parameters and arguments, they are not computed again.
    """

    def apply(params: Any, *args: Any) -> tuple[Any, Any]:
        output, made = module.apply({"params": params}, *args, mutable=["products"])
        return output, made["products"]

    return apply


def recalling(module: nn.Module) -> Callable[..., Any]:
    """`(params, products, *args) -> output` from the products that `remembering` has kept.

    Its gradients are those of computing them: to the parameters and to the arguments.
    """
    return lambda params, products, *args: module.apply(
        {"params": params, "products": products}, *args
    )


def abreast(heads: Mapping[str, Heads]) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """`(params, x, products=None) -> outputs, products` of heads that read the same, by name.

    Of x (..., inputs) their first layers are one product, for which a CPU takes 0.9 of the time of
    two. Products are those of `remembering`; if given, they are recalled as by `recalling`.
    """

    def apply(params: Any, x: Array, products: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        dtype = next(iter(heads.values())).dtype
        kernels = [params[name]["mlp"]["linear0"]["kernel"].astype(dtype) for name in heads]
        factors = factor(x, dtype), jnp.concatenate(kernels, -1)
        if products is None:
            joint = product(*factors)
        else:
            known = [products[name]["mlp"]["linear0"]["product"] for name in heads]
            joint = recall(jnp.concatenate(known, -1), *factors)
        parts = jnp.split(joint, np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1], -1)
        outputs, made = {}, {}
        for (name, module), part in zip(heads.items(), parts, strict=True):
            joined = {"mlp": {"linear0": {"product": part}}}
            variables = {"params": params[name], "joint": joined}
            if products is not None:
                variables["products"] = products[name]
            outputs[name], kept = module.apply(variables, x, mutable=["products"])
            made[name] = kept["products"]
        return outputs, made

    return apply
