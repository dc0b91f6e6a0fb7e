"""Layers: linear, block-linear, RMS norm, convolutions and stacks of them.

Every layer is a flax linen module with explicit input sizes, used through the pure `init` and
`apply`. Parameters are float32; inputs and parameters are cast to `dtype` at use. The order in
a stack is linear (or convolution, then pooling), RMS norm, SiLU. Initialisers and norms follow
DreamerV3 (arXiv:2301.04104).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from jaxwm.convolutions import (
    convolve,
    convolve_doubled,
    convolve_pooled,
    convolve_strided,
    convolve_transposed,
)
from jaxwm.products import Kernel, columns, factor, kernel_of, product, recall
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
        turned = columns(self.laid_out(self.inputs), x.astype(self.dtype))
        # The barrier keeps the compiler from transposing the larger x instead.
        return jax.lax.optimization_barrier(turned).T

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


class _Convolution(nn.Module):
    """A convolution of maps (n, h, w, inputs) by a kernel, which subclasses define, and a bias."""

    inputs: int
    outputs: int
    kernel: int = 5
    dtype: str = "float32"

    def convolve(self, x: Array, kernel: Array) -> Array:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        init = truncated_normal_in(self.kernel * self.kernel * self.inputs)
        shape = (self.kernel, self.kernel, self.inputs, self.outputs)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        x = self.convolve(x.astype(self.dtype), kernel)
        return x + _over(bias.astype(self.dtype), x)


class Conv(_Convolution):
    """Convolution with SAME padding: (n, h, w, inputs) to (n, h, w, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return convolve(x, kernel.astype(x.dtype))


class StridedConv(_Convolution):
    """`Conv` of stride 2: (n, h, w, inputs) to (n, h / 2, w / 2, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return convolve_strided(x, kernel.astype(x.dtype))


class PooledConv(_Convolution):
    """The largest of each 2x2 square of `Conv`: to (n, h / 2, w / 2, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return convolve_pooled(x, kernel.astype(x.dtype))


class UpsampleConv(_Convolution):
    """`Conv` of the nearest-neighbour doubling: to (n, 2h, 2w, outputs)."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        return convolve_doubled(x, kernel)


class ConvTranspose(_Convolution):
    """Transposed convolution of stride 2: to (n, 2h, 2w, outputs).

    Input pixels stand at the odd positions of a map of zeros, which is then convolved with
    stride 1.
    """

    def convolve(self, x: Array, kernel: Array) -> Array:
        return convolve_transposed(x, kernel.astype(x.dtype))


def keep_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gradient keeps only products and sums, and computes the rest again.

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

    Rows whose distance is a multiple of 1 KiB share few sets of the cache and evict one another:
    products then take up to twice the time.
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
    """`function`, which under `jax.vmap` on a CPU runs one member after the other.

    What a member computes in between then stays in the cache. The function may hold no traced
    values and no collectives: it takes all that differs between members as arguments.
    """
    if jax.default_backend() != "cpu":
        return function
    return jax.custom_batching.sequential_vmap(function)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *arrays)` for many rows, whose gradient keeps nothing in between.

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
