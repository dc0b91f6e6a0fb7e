"""Layers: linear, block-linear, norms, convolutions and stacks of them.

Every layer is a flax linen module with explicit input sizes, used through the pure `init` and
`apply`. Arrays have the batch first and features last. Parameters are float32; inputs and
parameters are cast to `dtype` at use. A stack is linear (or convolution, then pooling), norm,
activation. The defaults follow DreamerV3 (arXiv:2301.04104).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Num

from jaxwm import backend
from jaxwm.types import Array, Float

silu = nn.silu

Init = Literal["truncated_normal", "glorot", "orthogonal"]
Norm = Literal["rms", "layer", "none"]
Act = Literal["silu", "elu", "relu", "tanh"]

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "elu": nn.elu,
    "relu": nn.relu,
    "tanh": jnp.tanh,
}


def truncated_normal_in(fan_in: int, scale: float = 1.0) -> Callable[..., Array]:
    """Normal, truncated at two deviations, with standard deviation `scale * sqrt(1 / fan_in)`.

    The factor 1.1368 undoes the loss of variance by the truncation.
    """

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        draw = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        return draw * (1.1368 * fan_in**-0.5 * scale)

    return init


def initializer(
    name: Init, fan_in: int, scale: float = 1.0, in_axis: int = -2, out_axis: int = -1
) -> Callable[..., Array]:
    """How a kernel starts; a `scale` of 0 gives zeros.

    Args:
      name: "truncated_normal" has standard deviation `scale / sqrt(fan_in)`; "glorot" is uniform
        with `scale * sqrt(2 / (fan_in + fan_out))`, both counted from the shape; "orthogonal" has
        rows or columns of length `scale` that are orthogonal.
      fan_in: numbers that one output reads.
      scale: factor of the standard deviation, or the gain.
      in_axis: axis of the inputs.
      out_axis: axis of the outputs.
    """
    if scale == 0.0:
        return nn.initializers.zeros
    if name == "glorot":
        axes = {"in_axis": in_axis, "out_axis": out_axis}
        return nn.initializers.variance_scaling(scale**2, "fan_avg", "uniform", **axes)
    if name == "orthogonal":
        return nn.initializers.orthogonal(scale, column_axis=out_axis)
    return truncated_normal_in(fan_in, scale)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-4) * scale` over the last axis, computed in float32."""

    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead size"]) -> Float[Array, "*lead size"]:
        scale = self.param("scale", nn.initializers.ones, (self.size,))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-4)
        return (wide * inverse * _last(scale, wide)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis, in float32."""

    size: int
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: Float[Array, "*lead size"]) -> Float[Array, "*lead size"]:
        scale = self.param("scale", nn.initializers.ones, (self.size,))
        bias = self.param("bias", nn.initializers.zeros, (self.size,))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps)
        return (centred * inverse * _last(scale, wide) + _last(bias, wide)).astype(x.dtype)


def norm_layer(norm: Norm, size: int, name: str | None = None) -> Callable[[Array], Array]:
    """The norm of this kind; "none" is the identity and has no parameters."""
    if norm == "none":
        return lambda x: x
    return RMSNorm(size, name=name) if norm == "rms" else LayerNorm(size, name=name)


class Linear(nn.Module):
    """`x @ kernel + bias`; `rows` multiplies with some of the kernel's rows alone.

    Splitting a product by rows allows computing the share of inputs that do not depend on a
    scan's carry for all steps at once, outside the scan.
    """

    inputs: int
    outputs: int
    scale: float = 1.0
    dtype: str = "float32"
    kernel_init: Init = "truncated_normal"
    bias_init: float = 0.0

    def setup(self):
        init = initializer(self.kernel_init, self.inputs, self.scale)
        self.kernel = self.param("kernel", init, (self.inputs, self.outputs))
        self.bias = self.param("bias", nn.initializers.constant(self.bias_init), (self.outputs,))

    def __call__(self, x: Num[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        return self.add_bias(self.rows(x, 0))

    def rows(self, x: Num[Array, "*lead part"], start: int) -> Float[Array, "*lead outputs"]:
        """`x @ kernel[start : start + part]`, without the bias."""
        kernel = self.kernel[start : start + x.shape[-1]]
        return backend.product(x.astype(self.dtype), kernel.astype(self.dtype))

    def add_bias(self, x: Float[Array, "*lead outputs"]) -> Float[Array, "*lead outputs"]:
        return x + _last(self.bias.astype(self.dtype), x)


class BlockLinear(nn.Module):
    """`blocks` independent linear maps over equal contiguous slices of the input.

    The fan-in of the initialiser is the full input size, as in the reference implementation.
    Kernels therefore start smaller by `sqrt(blocks)` than their own inputs would ask for.
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
        return self.add_bias(self.rows(x, 0))

    def split(self, x: Float[Array, "*lead inputs"], count: int) -> list[Float[Array, "*lead _"]]:
        """The outputs in `count` parts: part i holds the i-th of equal parts of every block."""
        # The bias is added to the parts: XLA vectorises that on CPUs, and not a sum that is split.
        lead, bias = x.shape[:-1], self.bias.astype(self.dtype).reshape(self.blocks, count, -1)
        flat = self.rows(x, 0).reshape(*lead, self.blocks, count, -1)
        parts = (part.reshape(*lead, -1) for part in jnp.split(flat, count, -2))
        return [part + _last(bias[:, i], part) for i, part in enumerate(parts)]

    def rows(self, x: Float[Array, "*lead part"], start: int) -> Float[Array, "*lead outputs"]:
        """Each block's slice of `x`, times as many rows of its kernel from `start`; no bias."""
        kernel = self.kernel[:, start : start + x.shape[-1] // self.blocks]
        return backend.block_product(x.astype(self.dtype), kernel.astype(self.dtype))

    def shared_rows(
        self, x: Float[Array, "*lead part"], start: int
    ) -> Float[Array, "*lead outputs"]:
        """All of `x`, which every block reads, times rows of each kernel from `start`; no bias."""
        rows = self.kernel[:, start : start + x.shape[-1]].transpose(1, 0, 2)
        dense = rows.reshape(x.shape[-1], self.outputs)
        return backend.product(x.astype(self.dtype), dense.astype(self.dtype))

    def add_bias(self, x: Float[Array, "*lead outputs"]) -> Float[Array, "*lead outputs"]:
        return x + _last(self.bias.astype(self.dtype), x)


class MLP(nn.Module):
    """`layers` times linear, norm, activation: (..., inputs) to (..., units)."""

    inputs: int
    units: int
    layers: int
    dtype: str = "float32"
    norm: Norm = "rms"
    act: Act = "silu"
    kernel_init: Init = "truncated_normal"
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Num[Array, "*lead inputs"]) -> Float[Array, "*lead units"]:
        size = self.inputs
        for index in range(self.layers):
            options = self.scale, self.dtype, self.kernel_init
            x = Linear(size, self.units, *options, name=f"linear{index}")(x)
            x = norm_layer(self.norm, self.units, f"norm{index}")(x)
            x = ACTIVATIONS[self.act](x)
            size = self.units
        return x


class Heads(nn.Module):
    """An MLP and one linear output per name: (..., inputs) to {name: (..., size)}.

    `scale` is that of the outputs' kernels, `hidden_scale` that of the MLP's.
    """

    inputs: int
    units: int
    layers: int
    outputs: Mapping[str, int]
    scale: float = 1.0
    dtype: str = "float32"
    norm: Norm = "rms"
    act: Act = "silu"
    kernel_init: Init = "truncated_normal"
    hidden_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Num[Array, "*lead inputs"]) -> dict[str, Array]:
        x = MLP(
            self.inputs,
            self.units,
            self.layers,
            dtype=self.dtype,
            norm=self.norm,
            act=self.act,
            kernel_init=self.kernel_init,
            scale=self.hidden_scale,
            name="mlp",
        )(x)
        return {
            name: Linear(self.units, size, self.scale, self.dtype, self.kernel_init, name=name)(x)
            for name, size in self.outputs.items()
        }


class _Convolution(nn.Module):
    """A convolution of maps (n, h, w, inputs) with a kernel and a bias."""

    inputs: int
    outputs: int
    kernel: int = 5
    dtype: str = "float32"
    kernel_init: Init = "truncated_normal"

    def convolve(self, x: Array, kernel: Array) -> Array:
        """What a subclass makes of maps and a kernel of one type."""
        raise NotImplementedError

    def kernel_parameter(self) -> Array:
        """The kernel (k, k, inputs, outputs)."""
        init = initializer(self.kernel_init, self.kernel * self.kernel * self.inputs)
        return self.param("kernel", init, (self.kernel, self.kernel, self.inputs, self.outputs))

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        kernel = self.kernel_parameter().astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        x = self.convolve(x.astype(self.dtype), kernel)
        return x + _last(bias.astype(self.dtype), x)


class Conv(_Convolution):
    """Convolution with SAME padding: (n, h, w, inputs) to (n, h, w, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve(x, kernel)


class StridedConv(_Convolution):
    """`Conv` of stride 2: (n, h, w, inputs) to (n, h / 2, w / 2, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_strided(x, kernel)


class PooledConv(_Convolution):
    """The largest of each 2x2 square of `Conv`: to (n, h / 2, w / 2, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_pooled(x, kernel)


class UpsampleConv(_Convolution):
    """`Conv` of the nearest-neighbour doubling: to (n, 2h, 2w, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_doubled(x, kernel)


class ConvTranspose(_Convolution):
    """Transposed convolution of stride 2: to (n, 2h, 2w, outputs).

    Input pixels stand at the odd positions of a map of zeros, which is then convolved with
    stride 1.
    """

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_transposed(x, kernel)


class ValidConv(_Convolution):
    """Convolution without padding: each side becomes (side - kernel) // stride + 1."""

    kernel: int = 4
    stride: int = 2

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_valid(x, kernel, self.stride)


class ValidConvTranspose(_Convolution):
    """Transposed convolution of stride 2 without padding: sides become 2 * (side - 1) + kernel.

    y[2i+u, 2j+v, o] += x[i, j, c] * kernel[u, v, o, c]. The kernel is (k, k, outputs, inputs), as
    Keras has it.
    """

    def kernel_parameter(self) -> Array:
        fan_in = self.kernel * self.kernel * self.inputs
        init = initializer(self.kernel_init, fan_in, in_axis=-1, out_axis=-2)
        return self.param("kernel", init, (self.kernel, self.kernel, self.outputs, self.inputs))

    def convolve(self, x: Array, kernel: Array) -> Array:
        return backend.convolve_transposed_valid(x, kernel)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *arrays)` of many rows, whose gradient recomputes what lies between.

    The gradient computes it again for some of the rows at a time, and so takes little memory.
    """

    def by_parts(params: Any, *arrays: Any) -> Any:
        rows = jax.tree.leaves(arrays)[0].shape[0]
        parts = math.gcd(rows, 16)
        cut = jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), arrays)
        out = jax.lax.map(jax.checkpoint(lambda part: function(params, *part)), cut)
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)

    return by_parts


def _last(vector: Array, like: Array) -> Array:
    """A vector repeated along all axes of `like` but the last."""
    return jnp.broadcast_to(vector.reshape((1,) * (like.ndim - 1) + (-1,)), like.shape)


def call(module: nn.Module, method: str = "__call__") -> Callable[..., Any]:
    """`(params, *args) -> output` of one method of a module."""
    bound = functools.partial(module.apply, method=method)
    return lambda params, *args: bound({"params": params}, *args)
