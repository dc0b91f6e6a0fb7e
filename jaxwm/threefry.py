"""The draws of `jax.random`, bit for bit, at the speed of the arithmetic in them.

Of JAX as it comes: with `jax_threefry_partitionable` switched off it has other draws.
On a CPU JAX runs the rounds of its generator as a loop over whole arrays, which compiles sooner.
Written out they are one pass over the numbers, in a quarter of the time.

Source: Threefry-2x32 with 20 rounds, of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (2011).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend
from jaxtyping import Array, Float, UInt32

from jaxwm.types import Key

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Draws of fewer take no time worth a longer program.
MANY = 4096


def uniform(key: Key, shape: tuple[int, ...], low: float = 0.0) -> Float[Array, "..."]:
    """float32 of this shape from [low, 1)."""
    if not _worth_it(key, shape):
        return jax.random.uniform(key, shape, minval=low)
    numbers = jax.random.uniform(_written_out(key), (math.prod(shape),), minval=low)
    return numbers.reshape(shape)


def gumbel(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """float32 of this shape from the standard Gumbel distribution."""
    if not _worth_it(key, shape):
        return jax.random.gumbel(key, shape)
    return jax.random.gumbel(_written_out(key), (math.prod(shape),)).reshape(shape)


def normal(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """float32 of this shape from the standard normal distribution."""
    if not _worth_it(key, shape) or len(shape) < 3:
        return jax.random.normal(key, shape)
    # In the loop over a short last axis into which XLA would fuse it with the rounds, the inverse
    # of erf is taken of one number after the other; row by row, of as many as a vector holds.
    above = float(np.nextafter(np.float32(-1), np.float32(0)))
    rows = uniform(key, (shape[0], math.prod(shape[1:])), above)
    return jax.lax.map(_deviates, rows).reshape(shape)


def _deviates(uniform: Float[Array, " n"]) -> Float[Array, " n"]:
    """Of the standard normal distribution, from numbers of (-1, 1)."""
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


def _worth_it(key: Key, shape: tuple[int, ...]) -> bool:
    """Whether JAX runs the rounds as a loop, as on CPUs alone, and over many numbers."""
    looped = jax.default_backend() == "cpu" and jax.random.key_impl(key) == "threefry2x32"
    return looped and math.prod(shape) >= MANY


def _written_out(key: Key) -> Key:
    """A key with the same draws."""
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT)


def _rounds(key: UInt32[Array, "2"], high: Array, low: Array) -> tuple[Array, Array]:
    """The two words, uint32, that the counters of such words give under a key."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def _bits(key: UInt32[Array, "2"], width: int, shape: tuple[int, ...]) -> Array:
    """Random words of an array's places, from its first."""
    assert width == 32, width
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    x, y = _rounds(key, jnp.zeros_like(place), place)
    return x ^ y


_THREEFRY = extend.threefry_prng_impl
_WRITTEN_OUT = extend.define_prng_impl(
    key_shape=(2,),
    seed=_THREEFRY.seed,
    split=_THREEFRY.split,
    random_bits=_bits,
    fold_in=_THREEFRY.fold_in,
    name="threefry2x32_written_out",
)
