"""The operations of `plain`, faster on CPUs."""

from jaxwm.backend.plain import (  # noqa: F401
    block_product,
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
