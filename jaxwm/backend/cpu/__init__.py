"""The operations of `plain`, faster on CPUs. Every function computes the same, up to rounding."""

from jaxwm.backend.cpu.compiler import options as compiler_options
from jaxwm.backend.cpu.convolutions import (
    convolve,
    convolve_doubled,
    convolve_pooled,
    convolve_strided,
    convolve_transposed,
)
from jaxwm.backend.cpu.loops import by_slices, one_by_one, scan
from jaxwm.backend.cpu.products import block_product, product
from jaxwm.backend.cpu.statistics import interpolate, largest, percentile
from jaxwm.backend.plain import convolve_transposed_valid, convolve_valid

__all__ = [
    "block_product",
    "by_slices",
    "compiler_options",
    "convolve",
    "convolve_doubled",
    "convolve_pooled",
    "convolve_strided",
    "convolve_transposed",
    "convolve_transposed_valid",
    "convolve_valid",
    "interpolate",
    "largest",
    "one_by_one",
    "percentile",
    "product",
    "scan",
]
