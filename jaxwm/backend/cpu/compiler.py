"""Options of XLA's compiler for CPUs.

XLA hands products and reductions to the library YNNPACK by default; its own code is faster for the
shapes of world models. Vectors of 512 bits help CPUs that have them. By default XLA runs
independent products of a loop at the same time, and they compete for the cores. The
memory-optimised scheduler runs them one after the other. benchmarks/README.md gives the gains.
Options that the user sets in XLA_FLAGS are kept.
"""

import functools
import os

import jax

OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def compiler_options() -> dict[str, str]:
    """The options that this release of XLA knows and that the user has not set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {x: value for x, value in OPTIONS.items() if x not in flags and _known(x, value)}


@functools.cache
def _known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
