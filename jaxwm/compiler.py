"""`jit` with what jaxwm asks of XLA beyond its defaults.

On a CPU, XLA hands products and reductions to the library YNNPACK. Without it an update takes
about 7 % less time with vectors and 16 % less with images (size1m, jax 0.10.2, two cores; at
size12m 3 % more, of three turns). Vectors of 512 bits, where a CPU has them, take another 3 % off.
Temporary memory comes in pieces that `jaxwm.heap` keeps between one run of a program and the next,
unless programs are kept on disk: XLA writes none whose memory is in several pieces.
What a user's XLA_FLAGS say of an option stays as they say.

On CPUs that gain by it JAX_DEFAULT_MATMUL_PRECISION=bfloat16, which XLA itself passes over there,
is heeded: `products` rounds their factors to bfloat16 and sums in float32, as TPUs do by
default. YNNPACK multiplies these twice as fast as XLA does float32.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxwm import heap

LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
PIECES = "xla_multiheap_size_constraint_per_heap"
OPTIONS = {
    "cpu": {
        LIBRARY: "",
        "xla_cpu_prefer_vector_width": "512",
        # Of an array that is larger XLA says so, and gives it a piece of its own.
        PIECES: str(heap.PIECE),
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


def rounds_factors() -> bool:
    """Whether the factors of products are to be rounded to bfloat16, and the CPU can gain by it."""
    config: Any = jax.config
    asked = config.jax_default_matmul_precision in ("bfloat16", "BF16_BF16_F32")
    return asked and jax.default_backend() == "cpu" and has_bfloat16()


@functools.cache
def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32; known on Linux only.

    An instruction of AVX512-BF16 does twice the work of one of float32, but Intel's cores begin one
    of them where they begin two of float32: there it takes AMX. On a Xeon whose virtual machine
    hides it an update took 1.2 times as long (size1m, 1.4 times at size12m).
    """
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def options() -> dict[str, str]:
    """The present backend's options that this release of XLA knows and the user leaves open."""
    wanted = dict(OPTIONS.get(jax.default_backend(), {}))
    config: Any = jax.config
    if config.jax_enable_compilation_cache and config.jax_compilation_cache_dir:
        wanted.pop(PIECES, None)
    if rounds_factors():
        wanted[LIBRARY] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    named = os.environ.get("XLA_FLAGS", "")
    return {x: value for x, value in wanted.items() if x not in named and _known(x, value)}


@functools.cache
def _known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
