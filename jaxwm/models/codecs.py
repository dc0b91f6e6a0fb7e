"""Encoders and decoders of PlaNet, Dreamer V1 and Dreamer V2.

    images    64 -> 31 -> 14 -> 6 -> 2     convolutions, kernel 4, stride 2, no padding
    latents   1 -> 5 -> 13 -> 30 -> 64     transposed convolutions, kernels 5, 5, 6, 6
    vectors   dense layers

The networks see pixels centred to [-0.5, 0.5]; every observation is predicted as the mean of a
normal distribution of variance one. Vectors are not squashed.

Differs from the papers: vector keys are concatenated in sorted order, where Dreamer V2 takes the
order of the environment, because a dict of observations has no order here. PlaNet and Dreamer V1
know images only: `vectors="identity"` is what their recorded arrays use, and the dense encoder that
is the default is an addition. Integer observations are one-hot, and predicted as classes. Images of
other sizes than 64x64 get as many stages as bring their sides down to 1..4 pixels.

Source: PlaNet (arXiv:1811.04551), Dreamer (arXiv:1912.01603), DreamerV2 (arXiv:2010.02193).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num, UInt8

from jaxwm import dists, nets
from jaxwm.config import at_least
from jaxwm.dists import UnitNormal
from jaxwm.models.encoders import concat_entries, event_shape, split_spaces
from jaxwm.types import (
    Array,
    Box,
    Discrete,
    Float,
    JaxwmError,
    Key,
    Net,
    ObsSpace,
    Params,
    Space,
    WorldModel,
    is_image,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class ClassicCodecConfig:
    """Sizes of an encoder and a decoder.

    Args:
      units: width of the dense layers for vectors.
      layers: number of dense layers for vectors, in the encoder and in the decoder.
      depth: channels of the first convolution; each further one has twice as many.
      act: activation of the dense layers.
      conv_act: activation of the convolutions.
      norm: "layer" puts a LayerNorm before every activation, in convolutions over the channels.
      vectors: "mlp" encodes vectors by dense layers, "identity" takes them as they are.
    """

    units: int = 400
    layers: int = 4
    depth: int = 48
    act: nets.Act = "elu"
    conv_act: nets.Act = "elu"
    norm: Literal["none", "layer"] = "none"
    vectors: Literal["mlp", "identity"] = "mlp"

    def __post_init__(self):
        at_least(self, 1, "units", "layers", "depth")


def image_stages(size: tuple[int, ...]) -> tuple[tuple[int, int], list[int]]:
    """The decoder's smallest map and the kernels of its transposed convolutions.

    A kernel of 5 leads from n to the odd side 2 * n + 3, a kernel of 6 to the even side 2 * n + 4.

    Args:
      size: height and width of the image in pixels.

    Returns:
      Sides of 1 to 4 pixels, and the kernels from there to the image. For 64x64 these are 1x1 and
      5, 5, 6, 6, as published. The encoder has as many convolutions.

    Raises:
      JaxwmError: if a side is below 5, or height and width need different kernels.
    """
    kernels, sides = [], list(size)
    while min(sides) > 4 and len({side % 2 for side in sides}) == 1:
        kernels.insert(0, 5 if sides[0] % 2 else 6)
        sides = [(side - kernels[0]) // 2 + 1 for side in sides]
    if not kernels or max(sides) > 4:
        raise JaxwmError(
            f"Images of {size[0]}x{size[1]} pixels do not fit the convolutions of PlaNet and of "
            "Dreamer V1 and V2. Resize them to a square of at least 5 pixels, for example 64x64."
        )
    return (sides[0], sides[1]), kernels


class Encoder(nn.Module):
    """Observations (N, ...) to tokens (N, F): images first, then vectors."""

    spaces: Mapping[str, Space]
    config: ClassicCodecConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, obs: Mapping[str, Array]) -> Float[Array, "N F"]:
        vectors, images = split_spaces(self.spaces)
        tokens = []
        if images:
            x = jnp.concatenate([centred(obs[name]) for name in images], -1)
            tokens.append(self._convolve(x.astype(self.dtype)))
        if vectors:
            x = concat_entries(vectors, obs).astype(self.dtype)
            tokens.append(x if self.config.vectors == "identity" else self._dense(x))
        return jnp.concatenate(tokens, -1)

    def _convolve(self, x: Float[Array, "N h w c"]) -> Float[Array, "N F"]:
        config = self.config
        for index in range(len(image_stages(x.shape[1:3])[1])):
            depth = config.depth * 2**index
            conv = nets.ValidConv(
                x.shape[-1],
                depth,
                kernel=4,
                dtype=self.dtype,
                kernel_init="glorot",
                name=f"conv{index}",
            )
            x = nets.norm_layer(config.norm, depth, f"conv_norm{index}")(conv(x))
            x = nets.ACTIVATIONS[config.conv_act](x)
        return x.reshape(x.shape[0], -1)

    def _dense(self, x: Float[Array, "N n"]) -> Float[Array, "N units"]:
        return _mlp(x.shape[-1], self.config, self.dtype)(x)


class Decoder(nn.Module):
    """Latents h (N, D) and z (N, S) to the predicted means of each observation key (N, ...)."""

    spaces: Mapping[str, Space]
    config: ClassicCodecConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, deter: Float[Array, "N D"], stoch: Float[Array, "N S"]
    ) -> dict[str, Float[Array, "..."]]:
        vectors, images = split_spaces(self.spaces)
        outputs: dict[str, Array] = {}
        feat = jnp.concatenate([stoch, deter], -1)
        if images:
            pixels = self._convolve(feat, list(images.values()))
            ends = np.cumsum([space.shape[-1] for space in images.values()])[:-1]
            outputs.update(zip(images, jnp.split(pixels, ends, -1), strict=True))
        if vectors:
            x = _mlp(feat.shape[-1], self.config, self.dtype)(feat)
            for name, space in vectors.items():
                shape = event_shape(space)
                out = self._linear(x, math.prod(shape), f"out_{name}")
                outputs[name] = out.reshape(-1, *shape)
        return outputs

    def _convolve(self, feat: Float[Array, "N F"], spaces: list[Box]) -> Float[Array, "N h w c"]:
        config = self.config
        (h, w), kernels = image_stages(spaces[0].shape[:2])
        stages = len(kernels)
        # 32 * depth for four stages; the papers have no activation here.
        size = config.depth * 2 ** (stages + 1)
        x = self._linear(feat, h * w * size, "dense").reshape(-1, h, w, size)
        for index, kernel in enumerate(kernels):
            last = index == stages - 1
            depth = sum(space.shape[-1] for space in spaces)
            depth = depth if last else config.depth * 2 ** (stages - 2 - index)
            x = nets.ValidConvTranspose(
                x.shape[-1],
                depth,
                kernel,
                dtype=self.dtype,
                kernel_init="glorot",
                name=f"conv{index}",
            )(x)
            if not last:
                x = nets.norm_layer(config.norm, depth, f"conv_norm{index}")(x)
                x = nets.ACTIVATIONS[config.conv_act](x)
        return x

    def _linear(self, x: Float[Array, "N n"], size: int, name: str) -> Float[Array, "N m"]:
        linear = nets.Linear(x.shape[-1], size, dtype=self.dtype, kernel_init="glorot", name=name)
        return linear(x)


def _mlp(inputs: int, config: ClassicCodecConfig, dtype: str) -> nets.MLP:
    """The dense layers for vectors."""
    sizes = inputs, config.units, config.layers
    return nets.MLP(*sizes, dtype, config.norm, config.act, kernel_init="glorot", name="mlp")


def encoder(config: ClassicCodecConfig, obs_space: ObsSpace, dtype: str = "float32") -> Net:
    """`params, obs {key: (N, ...)} -> tokens (N, F)`.

    Images may be uint8 or already centred floats, such as those of `quantize`.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      dtype: compute type; parameters are float32.

    Raises:
      JaxwmError: if images differ in size or do not fit the convolutions.
    """
    module = Encoder(obs_space, config, dtype)
    _check_images(obs_space)

    def init(key: Key) -> Params:
        # An encoder that takes vectors as they are has no parameters.
        return module.init(key, zeros(obs_space, (1,))).get("params", {})

    return Net(init, nets.call(module))


def decoder(
    config: ClassicCodecConfig, obs_space: ObsSpace, deter: int, stoch: int, dtype: str = "float32"
) -> Net:
    """`params, h (N, deter), z (N, stoch) -> {key: mean (N, ...)}`, for `observation_dist`.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      deter: length of the deterministic state.
      stoch: length of the flat stochastic state.
      dtype: compute type; parameters are float32.

    Raises:
      JaxwmError: if images differ in size or do not fit the convolutions.
    """
    module = Decoder(obs_space, config, dtype)
    _check_images(obs_space)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, deter)), jnp.zeros((1, stoch)))["params"]

    return Net(init, nets.call(module))


def _check_images(obs_space: ObsSpace) -> None:
    for space in split_spaces(obs_space)[1].values():
        image_stages(space.shape[:2])


class CentredImage(UnitNormal):
    """`UnitNormal` over pixels centred to [-0.5, 0.5].

    Args:
      loc: (..., h, w, c) predicted pixels.
      bits: bits of the pixels of `mode`, in 1..8.
    """

    def __init__(self, loc: Float[Array, "*batch h w c"], bits: int = 8):
        super().__init__(loc, event_ndims=3)
        self.bits = bits

    def log_prob(self, value: Num[Array, "*batch h w c"]) -> Float[Array, "*batch"]:
        """Of a uint8 image, or of floats that are centred already."""
        return super().log_prob(centred(value))

    def mode(self) -> UInt8[Array, "*batch h w c"]:
        """The prediction as a uint8 image."""
        if self.bits < 8:
            return restore(self.loc, self.bits)
        return jnp.clip(jnp.round((self.loc + 0.5) * 255), 0, 255).astype(jnp.uint8)


def observation_dist(space: Space, raw: Float[Array, "..."], bits: int = 8) -> Any:
    """The distribution of an observation entry, from the decoder's output for it.

    Args:
      space: space of the entry.
      raw: output of `decoder`.
      bits: bits of the pixels that images are shown with, in 1..8.
    """
    if isinstance(space, Discrete):
        return dists.Categorical(raw, mask=space.mask(), event_ndims=len(space.shape))
    if is_image(space):
        return CentredImage(raw, bits)
    return UnitNormal(raw, event_ndims=len(space.shape))


def centred(image: Num[Array, "..."]) -> Float[Array, "..."]:
    """A uint8 image as `image / 255 - 0.5`; floats are taken to be centred already."""
    if image.dtype != jnp.uint8:
        return image
    return image.astype(jnp.float32) / 255 - 0.5


def quantize(
    image: UInt8[Array, "..."], noise: Float[Array, "..."], bits: int = 5
) -> Float[Array, "..."]:
    """An image of fewer bits, with noise that fills the steps between its levels.

        floor(image / 2^(8 - bits)) / 2^bits + noise / 2^bits - 0.5

    The noise keeps a model with continuous likelihoods from betting on the levels.

    Args:
      image: pixels in 0..255.
      noise: uniform draws in [0, 1), of the same shape.
      bits: bits that are kept, in 1..8.

    Returns:
      Pixels in [-0.5, 0.5).

    Source: "Preprocessing" of PlaNet (arXiv:1811.04551) and its code.
    """
    levels = 2.0**bits
    whole = jnp.floor(image.astype(jnp.float32) / 2.0 ** (8 - bits))
    return (whole + noise.astype(jnp.float32)) / levels - 0.5


def restore(pixels: Float[Array, "..."], bits: int = 5) -> UInt8[Array, "..."]:
    """The uint8 image of `quantize`, without the bits it has dropped; others are clipped."""
    whole = jnp.floor((pixels + 0.5) * 2.0**bits)
    return (jnp.clip(whole, 0, 2**bits - 1) * 2.0 ** (8 - bits)).astype(jnp.uint8)


def quantized(model: WorldModel, obs_space: ObsSpace, bits: int = 5) -> WorldModel:
    """A model that sees and predicts images of `quantize`, with fresh noise for every row.

    Its draws are (draws of `model`, a key per row), or (draws of `model`, {image key: noise}).

    Args:
      model: built with the codecs of this module.
      obs_space: space of each observation key.
      bits: bits that are kept, in 1..8.
    """
    images = split_spaces(obs_space)[1]

    def draws(key: Key, lead: tuple[int, ...]) -> tuple[Any, Any]:
        key_model, key_noise = jax.random.split(key)
        # Keys instead of noise: dreams draw, too, and would fill the memory with what they ignore.
        return model.draws(key_model, lead), jax.random.split(key_noise, lead)

    def prepare(steps: Any, keys: Any) -> Any:
        noise = keys if isinstance(keys, dict) else _uniform(keys, images)
        less = {name: quantize(steps.obs[name], noise[name], bits) for name in images}
        return steps._replace(obs=steps.obs | less)

    def observe(params: Params, carry: Any, steps: Any, draws: tuple[Any, Any]) -> Any:
        return model.observe(params, carry, prepare(steps, draws[1]), draws[0])

    def step(params: Params, carry: Any, action: Any, draws: tuple[Any, Any]) -> Any:
        return model.step(params, carry, action, draws[0])

    def loss(params: Params, carry: Any, steps: Any, draws: tuple[Any, Any]) -> Any:
        return model.loss(params, carry, prepare(steps, draws[1]), draws[0])

    return model._replace(draws=draws, observe=observe, step=step, loss=loss) if images else model


def _uniform(keys: Any, images: dict[str, Box]) -> dict[str, Array]:
    """Uniform draws for every image, from a key per row (*lead)."""

    def one(key: Key) -> dict[str, Array]:
        split = jax.random.split(key, len(images))
        pairs = zip(images.items(), split, strict=True)
        return {name: jax.random.uniform(k, space.shape) for (name, space), k in pairs}

    for _ in keys.shape:
        one = jax.vmap(one)
    return one(keys)
