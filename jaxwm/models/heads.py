"""The small networks around a recurrent core: prior, posterior and heads.

Every one is an MLP with one linear output. Papers differ in widths, norms, activations and
initialisers (`nets.MLP`), and in the distributions that heads predict.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxwm import nets
from jaxwm.models.rssm import Posterior
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
    outputs: int,
    style: Style,
    *,
    name: str = "out",
    scale: float = 1.0,
) -> Net:
    """An MLP with one linear output: (..., inputs) to (..., outputs).

    Args:
      inputs: length of the input.
      units: width of the hidden layers.
      layers: number of hidden layers.
      outputs: length of the output.
      style: how layers are built.
      name: name of the output layer in the parameters.
      scale: scale of the output layer's initial weights; 0 for an output that begins at 0.
    """
    dtype, norm, act, kernel_init = style
    module = nets.Heads(
        inputs, units, layers, {name: outputs}, scale, dtype, norm, act, kernel_init
    )
    apply = nets.call(module)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    return Net(init, lambda params, x: apply(params, x)[name])


class PosteriorNet(nn.Module):
    """One hidden layer over [h, tokens], with the product of the tokens split off."""

    deter: int
    tokens: int
    units: int
    outputs: int
    style: Style

    def setup(self):
        dtype, norm, _, kernel_init = self.style
        options = 1.0, dtype, kernel_init
        self.hidden = nets.Linear(self.deter + self.tokens, self.units, *options)
        self.norm = nets.norm_layer(norm, self.units)
        self.logits = nets.Linear(self.units, self.outputs, *options)

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
        return self.logits(nets.ACTIVATIONS[self.style.act](self.norm(x)))


def posterior(deter: int, tokens: int, units: int, outputs: int, style: Style) -> Posterior:
    """The network of q(z | h, tokens): one hidden layer over [h, tokens].

    Args:
      deter: length of h; 0 for a local posterior q(z | tokens).
      tokens: length of the tokens.
      units: width of the hidden layer.
      outputs: numbers that describe the distribution of z.
      style: how layers are built.
    """
    module = PosteriorNet(deter, tokens, units, outputs, style)

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, deter)), jnp.zeros((1, tokens)))["params"]

    return Posterior(init, nets.call(module, "embed"), nets.call(module, "raw"))
