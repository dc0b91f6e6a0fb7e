"""The small networks around a recurrent core: prior, posterior and heads.

Every one is an MLP with a linear output. Papers differ in widths, norms, activations and
initialisers (`nets.MLP`), and in the distributions that heads predict.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxwm import dists, nets
from jaxwm.models.rssm import Head, Posterior
from jaxwm.numerics import Scalar
from jaxwm.types import Array, Float, Key, Net, Params


class Style(NamedTuple):
    """How layers are built: compute type, norm, activation and initialiser of `nets.MLP`."""

    dtype: str = "float32"
    norm: nets.Norm = "rms"
    act: nets.Act = "silu"
    kernel_init: nets.Init = "truncated_normal"


def head(
    inputs: int,
    units: int,
    layers: int,
    outputs: int | Mapping[str, int],
    style: Style,
    *,
    name: str = "out",
    scale: float = 1.0,
) -> Net:
    """An MLP with a linear output: (..., inputs) to (..., outputs).

    Args:
      inputs: length of the input.
      units: width of the hidden layers.
      layers: number of hidden layers.
      outputs: length of the output; a dict makes it of several layers, by name, in its order.
      style: how layers are built.
      name: name of the output layer in the parameters, if it is one.
      scale: scale of the output layer's initial weights; 0 for an output that begins at 0.
    """
    dtype, norm, act, kernel_init = style
    sizes = {name: outputs} if isinstance(outputs, int) else outputs
    module = nets.Heads(inputs, units, layers, sizes, scale, dtype, norm, act, kernel_init)
    read = nets.call(module)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    def apply(params: Params, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        parts = read(params, x)
        return jnp.concatenate([parts[part] for part in sizes], -1)

    return Net(init, apply)


CLIPS: dict[str, Callable[[Array], Array]] = {
    "none": lambda reward: reward,
    "tanh": jnp.tanh,
    "sign": jnp.sign,
}


def normal_reward(net: Net, clip: Literal["none", "tanh", "sign"] = "none") -> Head:
    """The reward as a normal of variance one, clipped to [-1, 1] by `clip`, or not at all.

    Args:
      net: (..., F) to (..., 1).
      clip: "tanh" squashes rewards smoothly, "sign" keeps their sign alone.
    """
    return Head(
        net=net,
        dist=lambda raw: dists.UnitNormal(raw[..., 0], event_ndims=0),
        target=lambda steps: CLIPS[clip](steps.reward),
    )


def soft_continue(net: Net, discount: Scalar) -> Head:
    """Whether the episode continues, as a Bernoulli: it learns discount * (1 - is_terminal).

    Args:
      net: (..., F) to (..., 1), the log-odds.
      discount: discount of one step, in [0, 1].
    """
    return Head(
        net=net,
        dist=lambda raw: dists.SoftBernoulli(raw[..., 0]),
        target=lambda steps: discount * (1.0 - steps.is_terminal),
    )


class PosteriorNet(nn.Module):
    """One hidden layer over [h, tokens], with the product of the tokens split off."""

    deter: int
    tokens: int
    units: int
    outputs: int | Mapping[str, int]
    style: Style

    def setup(self):
        dtype, norm, _, kernel_init = self.style
        linear = functools.partial(nets.Linear, dtype=dtype, kernel_init=kernel_init)
        self.hidden = linear(self.deter + self.tokens, self.units)
        self.norm = nets.norm_layer(norm, self.units)
        if isinstance(self.outputs, int):
            self.logits = linear(self.units, self.outputs)
        else:
            self.parts = [linear(self.units, n, name=k) for k, n in self.outputs.items()]

    def __call__(self, deter: Float[Array, "N D"], tokens: Float[Array, "N F"]) -> Any:
        return self.raw(deter, self.embed(tokens))

    def embed(self, tokens: Float[Array, "*lead F"]) -> Float[Array, "*lead units"]:
        """The tokens' share of the hidden layer, bias included."""
        return self.hidden.add_bias(self.hidden.rows(tokens, self.deter))

    def raw(
        self, deter: Float[Array, "*lead D"], embedded: Float[Array, "*lead units"]
    ) -> Float[Array, "*lead outputs"]:
        """The output from h and the embedded tokens."""
        x = self.hidden.rows(deter, 0) + embedded if self.deter else embedded
        x = nets.ACTIVATIONS[self.style.act](self.norm(x))
        if isinstance(self.outputs, int):
            return self.logits(x)
        return jnp.concatenate([part(x) for part in self.parts], -1)


def posterior(
    deter: int, tokens: int, units: int, outputs: int | Mapping[str, int], style: Style
) -> Posterior:
    """The network of q(z | h, tokens): one hidden layer over [h, tokens].

    Args:
      deter: length of h; 0 for a local posterior q(z | tokens).
      tokens: length of the tokens.
      units: width of the hidden layer.
      outputs: numbers that describe the distribution of z; a dict makes them of several layers, by
        name, in its order.
      style: how layers are built.
    """
    module = PosteriorNet(deter, tokens, units, outputs, style)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, deter)), jnp.zeros((1, tokens)))["params"]

    return Posterior(init, nets.call(module, "embed"), nets.call(module, "raw"))
