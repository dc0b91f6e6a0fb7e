"""The operations of `jaxwm.backend.plain`, faster on CPUs and equal up to rounding."""

from jaxwm.backend.cpu.compiler import compiler_options as compiler_options
from jaxwm.backend.cpu.convolutions import convolve as convolve
from jaxwm.backend.cpu.convolutions import convolve_doubled as convolve_doubled
from jaxwm.backend.cpu.convolutions import convolve_pooled as convolve_pooled
from jaxwm.backend.cpu.convolutions import convolve_strided as convolve_strided
from jaxwm.backend.cpu.convolutions import convolve_transposed as convolve_transposed
from jaxwm.backend.cpu.convolutions import convolve_transposed_valid as convolve_transposed_valid
from jaxwm.backend.cpu.convolutions import convolve_valid as convolve_valid
from jaxwm.backend.cpu.loops import by_slices as by_slices
from jaxwm.backend.cpu.loops import one_by_one as one_by_one
from jaxwm.backend.cpu.loops import scan as scan
from jaxwm.backend.cpu.numbers import interpolate as interpolate
from jaxwm.backend.cpu.numbers import largest as largest
from jaxwm.backend.cpu.numbers import percentile as percentile
from jaxwm.backend.cpu.products import block_product as block_product
from jaxwm.backend.cpu.products import product as product
