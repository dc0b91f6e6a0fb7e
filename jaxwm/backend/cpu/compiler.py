"""What jaxwm asks of XLA on CPUs beyond its defaults.

XLA hands products and reductions to the library YNNPACK by default, which is slower for this work.
Vectors of 512 bits are used where a CPU has them. An option in the user's XLA_FLAGS stays as it is.
"""

import functools
import os

import jax

OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": "512"}


def options() -> dict[str, str]:
    """The options that this release of XLA knows and the user leaves open."""
    named = os.environ.get("XLA_FLAGS", "")
    return {x: value for x, value in OPTIONS.items() if x not in named and _known(x, value)}


@functools.cache
def _known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
