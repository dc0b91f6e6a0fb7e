"""Layers of PlaNet, Dreamer V1 and Dreamer V2, as pure functions of their parameters.

They differ from the layers of DreamerV3 (`jaxwm.nets`): Glorot-uniform kernels, LayerNorm with an
offset instead of RMS norm, and convolutions without padding. Parameters are float32 and are cast to
the type of the input at use.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxwm.types import Array, Float, Key, Params

Act = Literal["relu", "elu", "silu", "tanh", "none"]

ACTS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}


def glorot_uniform(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)); fans include the area of a convolution's kernel.

    Source: Glorot and Bengio (2010), the default of TensorFlow and Keras.
    """
    return jax.nn.initializers.glorot_uniform()(key, shape, jnp.float32)


def dense_init(key: Key, inputs: int, outputs: int, bias: float = 0.0) -> Params:
    """Parameters of `dense`: a Glorot-uniform kernel and a constant bias."""
    return {
        "kernel": glorot_uniform(key, (inputs, outputs)),
        "bias": jnp.full(outputs, bias, jnp.float32),
    }


def dense(params: Params, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
    """`x @ kernel + bias`."""
    return product(x, params["kernel"]) + over(params["bias"], x)


def product(
    x: Float[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*lead outputs"]:
    """`x @ kernel` in the type of `x`."""
    return x @ kernel.astype(x.dtype)


def over(vector: Float[Array, " n"], like: Array) -> Array:
    """A vector along the last axis of an array of the rank and type of `like`."""
    return vector.astype(like.dtype).reshape(*[1] * (like.ndim - 1), -1)


def layer_norm_init(size: int) -> Params:
    """Parameters of `layer_norm`: scale one, offset zero."""
    return {"scale": jnp.ones(size, jnp.float32), "offset": jnp.zeros(size, jnp.float32)}


def layer_norm(
    params: Params, x: Float[Array, "*lead n"], epsilon: float = 1e-3
) -> Float[Array, "*lead n"]:
    """`(x - mean) / sqrt(variance + epsilon) * scale + offset` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    out = centred * inverse * over(params["scale"], wide) + over(params["offset"], wide)
    return out.astype(x.dtype)


def normed(params: Params, name: str, x: Array) -> Array:
    """The layer norm called `name`, if the parameters hold one."""
    return layer_norm(params[name], x) if name in params else x


def stack_init(key: Key, sizes: tuple[int, ...], norm: bool = False) -> Params:
    """Parameters of `stack`: one dense layer from each size to the next."""
    params: dict[str, Any] = {}
    keys = jax.random.split(key, max(1, len(sizes) - 1))
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        params[f"dense{index}"] = dense_init(keys[index], inputs, outputs)
        if norm:
            params[f"norm{index}"] = layer_norm_init(outputs)
    return params


def stack(params: Params, x: Float[Array, "*lead inputs"], act: str) -> Float[Array, "*lead units"]:
    """Dense layers `dense0`, `dense1`, ..., each followed by its norm, if any, and activation."""
    for index in range(sum(name.startswith("dense") for name in params)):
        x = ACTS[act](normed(params, f"norm{index}", dense(params[f"dense{index}"], x)))
    return x


def convolve(
    params: Params, x: Float[Array, "n h w c"], stride: int = 2
) -> Float[Array, "n h2 w2 c2"]:
    """Convolution without padding, then the bias; the kernel is (kh, kw, in, out)."""
    kernel = params["kernel"].astype(x.dtype)
    out = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + over(params["bias"], out)


def convolve_transposed(
    params: Params, x: Float[Array, "n h w c"], stride: int = 2
) -> Float[Array, "n h2 w2 c2"]:
    """The transpose of `convolve`, then the bias; the kernel is (kh, kw, out, in).

    y[s*i + u, s*j + v, o] += x[i, j, c] * kernel[u, v, o, c]
    """
    kernel = params["kernel"].astype(x.dtype)
    out = jax.lax.conv_transpose(
        x,
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )
    return out + over(params["bias"], out)


def convolution_init(key: Key, kernel: tuple[int, int, int, int], outputs: int) -> Params:
    """A Glorot-uniform kernel of a (transposed) convolution and a bias of zeros."""
    return {"kernel": glorot_uniform(key, kernel), "bias": jnp.zeros(outputs, jnp.float32)}
