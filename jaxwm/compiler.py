"""`jit` with what jaxwm asks of XLA beyond its defaults.

On a CPU, XLA hands products and reductions to the library YNNPACK. Without it an update takes
about 7 % less time with vectors and 16 % less with images (size1m, jax 0.10.2, two cores; at
size12m 3 % more, of three turns). Vectors of 512 bits, where a CPU has them, take another 3 % off.
Temporary memory comes in pieces that `jaxwm.heap` keeps between one run of a program and the next.
What a user's XLA_FLAGS say of an option stays as they say.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from jaxwm import heap

OPTIONS = {
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_prefer_vector_width": "512",
        # Of an array that is larger XLA says so, and gives it a piece of its own.
        "xla_multiheap_size_constraint_per_heap": str(heap.PIECE),
    }
}


def jit(function: Callable[..., Any], **settings: Any) -> Any:
    """`jax.jit(function, **settings)` with `options()`.

    For the outermost of nested functions: the options are those of a whole program. On a CPU the
    process keeps what programs free, see `heap.keep`.
    """
    if jax.default_backend() == "cpu":
        heap.keep()
    return jax.jit(function, compiler_options=options(), **settings)


def options() -> dict[str, str]:
    """The present backend's options that this release of XLA knows and the user leaves open."""
    wanted = OPTIONS.get(jax.default_backend(), {})
    named = os.environ.get("XLA_FLAGS", "")
    return {x: value for x, value in wanted.items() if x not in named and _known(x, value)}


@functools.cache
def _known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
