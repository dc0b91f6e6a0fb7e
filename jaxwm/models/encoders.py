"""Observations to tokens and features back to observations, for vectors, images and dicts.

Vectors are entries that are not images: integers become one-hot, numbers are squashed by
symlog, all are flattened and concatenated in the sorted order of their keys. Images of one size
are concatenated on channels. Source: DreamerV3 (arXiv:2301.04104).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import dists, nets
from jaxwm.config import at_least, require
from jaxwm.numerics import symlog, wide
from jaxwm.types import (
    Array,
    Box,
    Discrete,
    JaxwmError,
    Key,
    Net,
    ObsSpace,
    Params,
    Space,
    is_image,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Sizes of the encoder and the decoder.

    Args:
      units: width of the vector branches.
      layers: depth of the vector branches.
      depth: base number of channels of the image branches.
      mults: channels of each stage, in units of `depth`.
      convs: "pool" convolves at full resolution and halves by max-pooling, the decoder by
        nearest-neighbour doubling; "strided" halves and doubles by strided convolutions
        between two full-resolution ones.
      blocks: blocks of the decoder's product from the deterministic state.
    """

    units: int = 1024
    layers: int = 3
    depth: int = 64
    mults: tuple[int, ...] = (2, 3, 4, 4)
    convs: Literal["pool", "strided"] = "pool"
    blocks: int = 8

    def __post_init__(self):
        at_least(self, 1, "units", "layers", "depth", "blocks")
        require(
            len(self.mults) > 0 and min(self.mults) > 0,
            f"CodecConfig.mults is {self.mults}; it must hold at least one stage, all positive.",
        )


def one_hot(space: Discrete, value: Array) -> Array:
    """(..., *shape) class indices to (..., *shape, width) zeros and ones; -1 gives zeros."""
    return jax.nn.one_hot(value, space.width)


def concat_entries(
    spaces: Mapping[str, Space],
    values: Mapping[str, Array],
    squash: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Entries of a dict as one vector: (..., *shape) each to (..., F), keys sorted.

    An entry with any missing element (-inf in numbers, -1 in classes) is zero as a whole. Classes
    may also be given as one-hot vectors (..., *shape, width), through which gradients flow.

    Args:
      spaces: the space of each entry.
      values: the entries, all with the same leading axes.
      squash: applied to numbers, not to classes.

    Returns:
      Vectors of length `concat_size(spaces)`, float32 (float64 if an entry is).
    """
    parts = []
    for name in sorted(spaces):
        space, value = spaces[name], jnp.asarray(values[name])
        axes = tuple(range(value.ndim - len(space.shape), value.ndim))
        if isinstance(space, Discrete) and jnp.issubdtype(value.dtype, jnp.floating):
            there = jnp.ones(value.shape[: value.ndim - len(space.shape) - 1], bool)
            part = value
        elif isinstance(space, Discrete):
            there = jnp.all(value >= 0, axes)
            part = one_hot(space, value)
        else:
            value = wide(value)
            there = jnp.all(value > -jnp.inf, axes)
            part = squash(jnp.where(jnp.expand_dims(there, axes), value, 0.0))
        part = part.reshape(*there.shape, -1)
        parts.append(jnp.where(there[..., None], part, 0.0))
    return jnp.concatenate(parts, -1)


def concat_size(spaces: Mapping[str, Space]) -> int:
    """Length of the vectors of `concat_entries`."""
    return sum(math.prod(event_shape(space)) for space in spaces.values())


def event_shape(space: Space) -> tuple[int, ...]:
    """Shape of one entry as the networks see it: classes get a one-hot axis."""
    return (*space.shape, space.width) if isinstance(space, Discrete) else space.shape


def split_spaces(spaces: Mapping[str, Space]) -> tuple[dict[str, Space], dict[str, Box]]:
    """Vector spaces and image spaces, each sorted by key.

    Raises:
      JaxwmError: if an entry is neither a vector nor an image, or images differ in size.
    """
    vectors, images = {}, {}
    for name in sorted(spaces):
        space = spaces[name]
        (images if is_image(space) else vectors)[name] = space
    sizes = {space.shape[:2] for space in images.values()}
    if len(sizes) > 1:
        raise JaxwmError(
            f"The image observations {sorted(images)} have different sizes {sorted(sizes)}; "
            "they are stacked on channels, so resize them to one size."
        )
    return vectors, images


def image_stages(size: tuple[int, ...], config: CodecConfig) -> list[int]:
    """Channels of each halving of an image, as many as bring its sides to 3..16.

    Args:
      size: height and width in pixels.
      config: the first `mults` are used; further stages repeat the last.

    Raises:
      JaxwmError: if no number of halvings ends with both sides whole and in 3..16, or the
        decoder's blocks do not divide the channels of the last.
    """
    wanted = len(config.mults) - (config.convs == "strided")
    for count in sorted(range(1, 10), key=lambda n: (abs(n - wanted), n)):
        sides = [side / 2**count for side in size]
        if all(side.is_integer() and 3 <= side <= 16 for side in sides):
            # The strided stack starts with a convolution at full resolution.
            total = count + (config.convs == "strided")
            mults = (*config.mults, *[config.mults[-1]] * total)[:total]
            depths = [config.depth * mult for mult in mults]
            require(
                depths[-1] % config.blocks == 0,
                f"CodecConfig.blocks is {config.blocks}; it must divide the {depths[-1]} channels "
                "of the smallest image stage, which are depth times its entry of mults.",
            )
            return depths
    raise JaxwmError(
        f"Images of {size[0]}x{size[1]} pixels cannot be halved to sides of 3 to 16 pixels. "
        "Resize them, for example to 64x64."
    )


class Encoder(nn.Module):
    """Observations (N, ...) to tokens (N, F)."""

    spaces: Mapping[str, Space]
    config: CodecConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, obs: Mapping[str, Array]) -> Array:
        vectors, images = split_spaces(self.spaces)
        tokens = []
        if vectors:
            x = concat_entries(vectors, obs, symlog).astype(self.dtype)
            size, layers = self.config.units, self.config.layers
            tokens.append(nets.MLP(x.shape[-1], size, layers, self.dtype, name="mlp")(x))
        if images:
            x = jnp.concatenate([obs[name] for name in images], -1)
            tokens.append(self._convolve(x.astype(self.dtype) / 255 - 0.5))
        return jnp.concatenate(tokens, -1)

    def _convolve(self, x: Array) -> Array:
        strided = self.config.convs == "strided"
        depths = image_stages(x.shape[1:3], self.config)
        for index, depth in enumerate(depths):
            halve = nets.StridedConv if strided else nets.PooledConv
            conv = nets.Conv if strided and index == 0 else halve
            x = conv(x.shape[-1], depth, dtype=self.dtype, name=f"conv{index}")(x)
            x = jax.nn.silu(nets.RMSNorm(depth, name=f"conv_norm{index}")(x))
        return x.reshape(x.shape[0], -1)


def flat_net(spaces: Mapping[str, Space]) -> Net:
    """Observations as one vector, without parameters: `params, obs (N, ...) -> (N, F)`.

    Integers become one-hot, pixels numbers in 0 to 1, and all other numbers stay as they are.
    """

    def apply(params: Params, obs: Mapping[str, Array]) -> Array:
        del params
        entries = {
            name: obs[name] / 255 if is_image(space) else obs[name]
            for name, space in spaces.items()
        }
        return concat_entries(spaces, entries)

    return Net(lambda key: {}, apply)


class Decoder(nn.Module):
    """Latents (N, D) and (N, S*K) to the raw outputs of each observation key (N, ...)."""

    spaces: Mapping[str, Space]
    config: CodecConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, stoch: Array) -> dict[str, Array]:
        vectors, images = split_spaces(self.spaces)
        outputs = {}
        if vectors:
            # The decoder reads [stoch, deter], all other heads [deter, stoch].
            x = jnp.concatenate([stoch, deter], -1)
            size, layers = self.config.units, self.config.layers
            x = nets.MLP(x.shape[-1], size, layers, self.dtype, name="mlp")(x)
            for name, space in vectors.items():
                shape = event_shape(space)
                out = self._linear(x, math.prod(shape), f"out_{name}")
                outputs[name] = out.reshape(-1, *shape)
        if images:
            pixels = jax.nn.sigmoid(self._convolve(deter, stoch, list(images.values())))
            ends = np.cumsum([space.shape[-1] for space in images.values()])[:-1]
            outputs.update(zip(images, jnp.split(pixels, ends, -1), strict=True))
        return outputs

    def _convolve(self, deter: Array, stoch: Array, spaces: list[Box]) -> Array:
        config, strided = self.config, self.config.convs == "strided"
        size = spaces[0].shape[:2]
        depths = image_stages(size, config)
        halvings = len(depths) - strided
        h, w, c = size[0] >> halvings, size[1] >> halvings, depths[-1]
        blocks = config.blocks
        sizes = (deter.shape[-1], h * w * c, blocks, self.dtype)
        x0 = nets.BlockLinear(*sizes, name="space_deter")(deter)
        # Each block holds (h, w, c / blocks): its channels are a contiguous slice of c.
        x0 = x0.reshape(-1, blocks, h, w, c // blocks)
        x0 = x0.transpose(0, 2, 3, 1, 4).reshape(-1, h, w, c)
        x1 = self._linear(stoch, 2 * config.units, "space_stoch")
        x1 = jax.nn.silu(nets.RMSNorm(2 * config.units, name="space_stoch_norm")(x1))
        x1 = self._linear(x1, h * w * c, "space_hidden").reshape(-1, h, w, c)
        x = jax.nn.silu(nets.RMSNorm(c, name="space_norm")(x0 + x1))
        for index, depth in reversed(list(enumerate(depths[:-1]))):
            x = self._double(x, depth, f"conv{index}")
            x = jax.nn.silu(nets.RMSNorm(depth, name=f"conv_norm{index}")(x))
        channels = sum(space.shape[-1] for space in spaces)
        if strided:
            return nets.Conv(x.shape[-1], channels, dtype=self.dtype, name="image_out")(x)
        return self._double(x, channels, "image_out")

    def _linear(self, x: Array, size: int, name: str) -> Array:
        return nets.Linear(x.shape[-1], size, dtype=self.dtype, name=name)(x)

    def _double(self, x: Array, depth: int, name: str) -> Array:
        if self.config.convs == "strided":
            return nets.ConvTranspose(x.shape[-1], depth, dtype=self.dtype, name=name)(x)
        return nets.UpsampleConv(x.shape[-1], depth, dtype=self.dtype, name=name)(x)


def observation_dist(space: Space, output: Array) -> Any:
    """The distribution of an observation entry, from the decoder's output for it."""
    if isinstance(space, Discrete):
        return dists.Categorical(output, mask=space.mask(), event_ndims=len(space.shape))
    if is_image(space):
        return dists.ImageSquaredError(output)
    return dists.SymlogSquaredError(output, event_ndims=len(space.shape))


def reconstruction_loss(space: Space, dist: Any, target: Array) -> Array:
    """`-log_prob` of an observation entry; an entry with a missing element costs nothing."""
    if not getattr(space, "missing", False):
        return -dist.log_prob(target)
    axes = tuple(range(target.ndim - len(space.shape), target.ndim))
    absent = target < 0 if isinstance(space, Discrete) else ~jnp.isfinite(target)
    there = ~jnp.any(absent, axes)
    safe = jnp.where(absent, jnp.zeros_like(target), target)
    return jnp.where(there, -dist.log_prob(safe), 0.0)


def encoder(config: CodecConfig, obs_space: ObsSpace, dtype: str = "float32") -> Net:
    """`params, obs {key: (N, ...)} -> tokens (N, F)`."""
    module = Encoder(obs_space, config, dtype)

    def init(key: Key) -> Params:
        return module.init(key, zeros(obs_space, (1,)))["params"]

    return Net(init, nets.call(module))


def decoder(
    config: CodecConfig, obs_space: ObsSpace, deter: int, stoch: int, dtype: str = "float32"
) -> Net:
    """`params, h (N, deter), z (N, stoch) -> {key: raw (N, ...)}`."""
    module = Decoder(obs_space, config, dtype)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, deter)), jnp.zeros((1, stoch)))["params"]

    return Net(init, nets.call(module))


def token_size(encoder: Net, obs_space: ObsSpace) -> int:
    """Length of the tokens of an encoder."""

    def tokens(key: Key) -> Array:
        return encoder.apply(encoder.init(key), zeros(obs_space, (1,)))

    return jax.eval_shape(tokens, jax.random.key(0)).shape[-1]


def recomputed(net: Net) -> Net:
    """A network whose gradient keeps nothing in between, see `nets.recomputed`."""
    return Net(net.init, nets.recomputed(net.apply))
