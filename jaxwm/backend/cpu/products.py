"""Matrix products whose gradients are as fast on CPUs as they are themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Num

from jaxwm.types import Array, Float


@jax.custom_vjp
def product(
    x: Num[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel`; it has no forward-mode derivative."""
    return jnp.matmul(x, kernel, preferred_element_type=kernel.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    inputs, outputs = kernel.shape
    rows, grads = x.reshape(-1, inputs), grad.reshape(-1, outputs)
    # CPU routines transpose the left factor, which should be the smaller one. The barrier keeps the
    # compiler from swapping the factors.
    if outputs < inputs:
        grad_kernel = jax.lax.optimization_barrier(grads.T @ rows).T
    else:
        grad_kernel = rows.T @ grads
    return (grad @ kernel.T).astype(x.dtype), grad_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def block_product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "G block_inputs block_outputs"]
) -> Float[Array, "*lead outputs"]:
    """Multiplies each of G equal slices of the last axis by a kernel of its own.

    The blocks come first while they are multiplied: XLA would otherwise multiply row by row.
    """
    blocks, inputs, _ = kernel.shape
    grouped = jnp.swapaxes(x.reshape(-1, blocks, inputs), 0, 1)
    return jnp.swapaxes(grouped @ kernel, 0, 1).reshape(*x.shape[:-1], -1)
