"""The operations of `plain`, faster on CPUs."""

import jax.numpy as jnp

from jaxwm.backend.plain import (  # noqa: F401
    by_slices,
    convolve_transposed_valid,
    convolve_valid,
    largest,
    one_by_one,
    percentile,
    scan,
)
from jaxwm.compiler import options as compiler_options  # noqa: F401
from jaxwm.convolutions import (  # noqa: F401
    convolve,
    convolve_doubled,
    convolve_pooled,
    convolve_strided,
    convolve_transposed,
)
from jaxwm.products import product  # noqa: F401


def block_product(x, kernel):
    blocks, inputs, outputs = kernel.shape
    lead = x.shape[:-1]
    grouped = jnp.swapaxes(x.reshape(-1, blocks, inputs), 0, 1)
    return jnp.swapaxes(jnp.matmul(grouped, kernel), 0, 1).reshape(*lead, -1)
