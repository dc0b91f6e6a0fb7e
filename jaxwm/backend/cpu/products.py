"""Matrix products with fast gradients.

A kernel is (inputs, outputs), or (blocks, inputs, outputs) for independent products of equal slices
of the features. `jit` gives products a name by which `loops.scan` recognises them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.types import Array, Float

NAME = "jaxwm_product"


def product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel`."""
    return _named(x, kernel)


def block_product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "G block_inputs block_outputs"]
) -> Float[Array, "*lead outputs"]:
    """Multiplies each of G equal slices of the last axis by a kernel of its own."""
    return _named(x, kernel)


def multiply(x: Array, kernel: Array) -> Array:
    """`product` or `block_product`, as the kernel's rank says."""
    if kernel.ndim == 2:
        return x @ kernel
    # XLA multiplies fast if blocks come first in memory.
    each = jnp.matmul(_blocks_first(x, len(kernel)), kernel)
    return jnp.swapaxes(each, 0, 1).reshape(*x.shape[:-1], -1)


def kernel_gradient(x: Array, grad: Array, kernel: Array) -> Array:
    """The gradient of `multiply(x, kernel)` to the kernel; `kernel` gives the shape."""
    if kernel.ndim == 3:
        x, grad = _blocks_first(x, len(kernel)), _blocks_first(grad, len(kernel))
        return jnp.matmul(jnp.swapaxes(x, 1, 2), grad)
    inputs, outputs = kernel.shape
    x, grad = x.reshape(-1, inputs), grad.reshape(-1, outputs)
    if inputs <= outputs:
        return x.T @ grad
    # XLA transposes the left factor, so make that the smaller one. The barrier keeps XLA from
    # swapping the factors again.
    return jax.lax.optimization_barrier(grad.T @ x).T


def _blocks_first(x: Array, blocks: int) -> Array:
    """(..., G * I) to (G, N, I)."""
    return jnp.swapaxes(x.reshape(-1, blocks, x.shape[-1] // blocks), 0, 1)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return multiply(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return multiply(grad, jnp.swapaxes(kernel, -1, -2)), kernel_gradient(x, grad, kernel)


_product.defvjp(_forward, _backward)


def jaxwm_product(x: Array, kernel: Array) -> Array:
    return _product(x, kernel)


_named = jax.jit(jaxwm_product)


class Factors(NamedTuple):
    """The two factors of a kernel's gradient, for each step of a loop."""

    x: Float[Array, "steps *lead inputs"]
    grad: Float[Array, "steps *lead outputs"]


@jax.custom_vjp
def product_in_loop(x: Array, kernel: Array, turned: Array, factors: Factors) -> Array:
    """`multiply(x, kernel)`, whose gradient to `factors` is the pair that the kernel's needs.

    Args:
      x: rows.
      kernel: gets no gradient.
      turned: the transposed kernel, in memory. Transposing it in every step would take most of
        the time of a product of few rows.
      factors: one step's zeros of `factors_of`.
    """
    return multiply(x, kernel)


def _loop_forward(x, kernel, turned, factors):
    return multiply(x, kernel), (x, turned)


def _loop_backward(saved, grad):
    x, turned = saved
    # No gradient at all instead of zeros, which a loop would add up.
    return multiply(grad, turned), None, None, Factors(x, grad)


product_in_loop.defvjp(_loop_forward, _loop_backward)


def factors_of(kernel: Array, x_shape: tuple[int, ...], grad_shape: tuple[int, ...]) -> Factors:
    """Zeros whose gradient becomes the kernel's: one product over the rows of all steps."""

    @jax.custom_vjp
    def zeros(kernel: Array) -> Factors:
        return Factors(jnp.zeros(x_shape, kernel.dtype), jnp.zeros(grad_shape, kernel.dtype))

    def backward(kernel: Array, factors: Factors) -> tuple[Array]:
        return (kernel_gradient(factors.x, factors.grad, kernel),)

    zeros.defvjp(lambda kernel: (zeros(kernel), kernel), backward)
    return zeros(kernel)
