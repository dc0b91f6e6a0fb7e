"""The only package that asks what the device is.

`plain` defines each operation in a few lines and runs on accelerators; `cpu` computes the same
faster on CPUs. Each call picks one of them while its caller is traced: `cpu` on CPUs, `plain`
elsewhere, and `plain` everywhere if the environment variable JAXWM_BACKEND is "plain". The
docstrings of `plain` say what each operation computes. All arrays have the batch first and the
features last.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from jaxwm.backend import cpu, plain
from jaxwm.types import Array, Float, Int, JaxwmError

VARIABLE = "JAXWM_BACKEND"


def current() -> ModuleType:
    """The module whose operations are traced now: `plain` or `cpu`.

    Raises:
      JaxwmError: if the environment variable names no backend.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "plain"):
        raise JaxwmError(
            f'{VARIABLE} is "{wanted}". Set it to "plain" for the plain definitions of all '
            "operations, or unset it for the fastest ones of the device."
        )
    return plain if wanted or jax.default_backend() != "cpu" else cpu


def kind() -> str:
    """The kind of device that programs run on: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def jit(function: Callable[..., Any], **settings: Any) -> Any:
    """`jax.jit(function, **settings)` with the compiler options of the device.

    Use it for the outermost function of a program: options hold for whole programs.
    """
    options = cpu.compiler_options() if jax.default_backend() == "cpu" else {}
    return jax.jit(function, compiler_options=options, **settings)


def compute_dtype(name: str) -> str:
    """The compute type `name`; "auto" is bfloat16 on accelerators that have it, else float32."""
    if name != "auto":
        return name
    device = jax.devices()[0]
    # Turing and Volta have no bfloat16 units: XLA would emulate it.
    capability = str(getattr(device, "compute_capability", ""))  # AMD's is a name such as "gfx90a"
    emulated = capability[:1].isdigit() and float(capability) < 8
    return "bfloat16" if device.platform in ("gpu", "tpu") and not emulated else "float32"


def product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel`."""
    return current().product(x, kernel)


def block_product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "G block_inputs block_outputs"]
) -> Float[Array, "*lead outputs"]:
    """Multiplies each of G equal slices of the last axis by a kernel of its own."""
    return current().block_product(x, kernel)


def scan(step: Callable[..., Any], params: Any, carry: Any, xs: Any) -> Any:
    """`jax.lax.scan` of `step(params, carry, x) -> carry, y`."""
    return current().scan(step, params, carry, xs)


def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h w o"]:
    """Convolution with SAME padding."""
    return current().convolve(x, kernel)


def convolve_strided(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """Convolution of stride 2 with SAME padding."""
    return current().convolve_strided(x, kernel)


def convolve_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"], stride: int = 2
) -> Float[Array, "n h2 w2 o"]:
    """Convolution without padding."""
    return current().convolve_valid(x, kernel, stride)


def convolve_pooled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """The largest of each 2x2 square of `convolve`, of maps with even sides."""
    return current().convolve_pooled(x, kernel)


def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with every pixel repeated in a 2x2 square."""
    return current().convolve_doubled(x, kernel)


def convolve_transposed(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "n h2 w2 o"]:
    """`convolve` of the map with zeros between its pixels, of odd kernels."""
    return current().convolve_transposed(x, kernel)


def convolve_transposed_valid(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k o c"]
) -> Float[Array, "n h2 w2 o"]:
    """Transposed convolution of stride 2 without padding."""
    return current().convolve_transposed_valid(x, kernel)


def by_slices(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`; a CPU may compute large slices of the first axis one by one.

    Args:
      function: treats the entries of the first axis one by one, and also takes single entries.
      arrays: pytrees of arrays with the same first axis.
    """
    return current().by_slices(function, *arrays)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose members under `jax.vmap` a CPU computes one after the other.

    The function may hold no traced values and no collectives: it takes everything that differs
    between members as arguments.
    """
    return current().one_by_one(function)


def percentile(x: Float[Array, "..."], *wanted: float) -> Float[Array, " n"]:
    """Percentiles (0..100) of all entries, interpolated linearly; one NaN makes all NaN."""
    return current().percentile(x, *wanted)


def largest(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """The maximum over the last axis, which stays with size 1."""
    return current().largest(x)


def interpolate(
    x: Float[Array, "*batch n"], below: Int[Array, "*batch"], share: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """`(1 - share) * x[below] + share * x[below + 1]` along the last axis.

    Gradients flow to `x` only.
    """
    return current().interpolate(x, below, jax.lax.stop_gradient(share))
