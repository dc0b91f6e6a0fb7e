"""Matrix products whose gradients are as fast on CPUs as they are themselves.

`product` is of rows, the batch first. `columns` is of features first, as the recurrent core has
them, with a kernel that was laid out before the loop. `rounded` and `recall` are for factors and
products that are kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Num

from jaxwm import compiler
from jaxwm.types import Array, Float


def multiply(left: Array, right: Array, dtype: Any = None) -> Array:
    """`left @ right`, as `dtype` if one is given.

    Where `compiler.rounds_factors` says so, factors are rounded to bfloat16, summed in float32.
    """
    dtype = dtype or jnp.result_type(left, right)
    if not compiler.rounds_factors():
        return jnp.matmul(left, right, preferred_element_type=dtype)
    left, right = _as_bfloat16(left), _as_bfloat16(right)
    product = jnp.matmul(left, right, precision="default", preferred_element_type=jnp.float32)
    # Of a product behind a barrier no other order is made: XLA would not multiply bfloat16 then.
    return jax.lax.optimization_barrier(product).astype(dtype)


def rounded(x: Array) -> Array:
    """`x` as `multiply` reads it: where factors are rounded, the bits (uint16) of its bfloat16.

    For what is kept to be multiplied only. It is rounded to bfloat16, halfway cases away from zero,
    and has no derivative.
    """
    if not compiler.rounds_factors() or x.dtype == jnp.uint16:
        return x
    # For a plain conversion LLVM makes vectors half as long, of what is fused with it too.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return ((bits + jnp.uint32(0x8000)) >> 16).astype(jnp.uint16)


def _as_bfloat16(x: Array) -> Array:
    # XLA on a CPU multiplies bfloat16 only as it lies in memory, and a row is no other's transpose.
    row = jax.lax.optimization_barrier(rounded(x).ravel())
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
    """`x`, computed row by row: a CPU cannot vectorise over few columns."""
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
    # What `rounded` has made is not learned from.
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
    """`x` as `product` takes it: in the compute type, or as `rounded` has it."""
    return x if x.dtype == jnp.uint16 else x.astype(dtype)
