"""The recurrent memories of PlaNet, Dreamer V1 and Dreamer V2: three different GRUs.

Each has a dense input layer in front and reads the previous stochastic state z and the action a
that led to this row:

    x  = act(W [z, a] + b)                  `img_in`; Dreamer V2 may put a LayerNorm before act
    h' = gru(x, h)

The GRUs differ in where the reset gate acts, in their biases and in which gate keeps the old state.
Each cell below is written as in its paper's code.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxwm import backend, nets
from jaxwm.config import at_least
from jaxwm.nets import Act
from jaxwm.types import Array, Bool, Core, Float, Key, Params


@dataclasses.dataclass(frozen=True)
class PlanetGRUConfig:
    """Sizes of PlaNet's core.

    Args:
      deter: size D of the deterministic state.
      hidden: width of the input layer.
      act: activation of the input layer.
    """

    deter: int = 200
    hidden: int = 200
    act: Act = "relu"

    def __post_init__(self):
        at_least(self, 1, "deter", "hidden")


@dataclasses.dataclass(frozen=True)
class KerasGRUConfig:
    """Sizes of Dreamer V1's core.

    Args:
      deter: size D of the deterministic state.
      hidden: width of the input layer; the paper's is `deter`.
      act: activation of the input layer.
    """

    deter: int = 200
    hidden: int = 200
    act: Act = "elu"

    def __post_init__(self):
        at_least(self, 1, "deter", "hidden")


@dataclasses.dataclass(frozen=True)
class LayerNormGRUConfig:
    """Sizes of Dreamer V2's core.

    Args:
      deter: size D of the deterministic state.
      hidden: width of the input layer.
      act: activation of the input layer.
      norm: "layer" puts a LayerNorm into the input layer; the GRU itself always has one.
    """

    deter: int = 1024
    hidden: int = 1024
    act: Act = "elu"
    norm: Literal["none", "layer"] = "none"

    def __post_init__(self):
        at_least(self, 1, "deter", "hidden")


GRUConfig = PlanetGRUConfig | KerasGRUConfig | LayerNormGRUConfig


class PlanetGRU(nn.Module):
    """The GRU of PlaNet, which resets the state before the candidate's product.

        r, u = sigmoid(W [x, h] + b)            b starts at 1, which keeps the old state
        c    = tanh(V [x, r * h] + d)
        h'   = u * h + (1 - u) * c

    Source: tf.contrib.rnn.GRUBlockCell, used in PlaNet (arXiv:1811.04551).
    """

    hidden: int
    deter: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B hidden"], h: Float[Array, "B D"]) -> Float[Array, "B D"]:
        linear = functools.partial(nets.Linear, dtype=self.dtype, kernel_init="glorot")
        size = self.hidden + self.deter
        gates = linear(size, 2 * self.deter, bias_init=1.0, name="gates")
        candidate = linear(size, self.deter, name="candidate")
        r, u = jnp.split(jax.nn.sigmoid(gates(jnp.concatenate([x, h], -1))), 2, -1)
        c = candidate(jnp.concatenate([x, r * h], -1))
        return u * h + (1 - u) * jnp.tanh(c)


class KerasGRU(nn.Module):
    """The GRU of Dreamer V1, which resets after the recurrent product and has two biases.

        x_z, x_r, x_c = W x + b
        h_z, h_r, h_c = U h + d                 U starts with orthonormal rows
        z  = sigmoid(x_z + h_z)
        r  = sigmoid(x_r + h_r)
        c  = tanh(x_c + r * h_c)
        h' = z * h + (1 - z) * c

    Source: tf.keras.layers.GRUCell with `reset_after`, used in Dreamer (arXiv:1912.01603).
    """

    hidden: int
    deter: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B hidden"], h: Float[Array, "B D"]) -> Float[Array, "B D"]:
        linear = functools.partial(nets.Linear, outputs=3 * self.deter, dtype=self.dtype)
        from_x = linear(self.hidden, kernel_init="glorot", name="input")(x)
        from_h = linear(self.deter, kernel_init="orthogonal", name="recurrent")(h)
        x_z, x_r, x_c = jnp.split(from_x, 3, -1)
        h_z, h_r, h_c = jnp.split(from_h, 3, -1)
        z, r = jax.nn.sigmoid(x_z + h_z), jax.nn.sigmoid(x_r + h_r)
        c = jnp.tanh(x_c + r * h_c)
        return z * h + (1 - z) * c


class LayerNormGRU(nn.Module):
    """The GRU of Dreamer V2: one product and one LayerNorm over all three parts together.

        r, c, u = LayerNorm(W [x, h] + b)
        c  = tanh(sigmoid(r) * c)
        u  = sigmoid(u - 1)                     starts by keeping the old state
        h' = u * c + (1 - u) * h

    Source: DreamerV2 (arXiv:2010.02193) and its code.
    """

    hidden: int
    deter: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B hidden"], h: Float[Array, "B D"]) -> Float[Array, "B D"]:
        outputs = 3 * self.deter
        linear = nets.Linear(
            self.hidden + self.deter, outputs, dtype=self.dtype, kernel_init="glorot", name="gates"
        )
        parts = linear(jnp.concatenate([x, h], -1))
        r, c, u = jnp.split(nets.LayerNorm(outputs, name="norm")(parts), 3, -1)
        c = jnp.tanh(jax.nn.sigmoid(r) * c)
        u = jax.nn.sigmoid(u - 1)
        return u * c + (1 - u) * h


GRUS: dict[type, type[nn.Module]] = {
    PlanetGRUConfig: PlanetGRU,
    KerasGRUConfig: KerasGRU,
    LayerNormGRUConfig: LayerNormGRU,
}


def core(config: GRUConfig, stoch_size: int, action_size: int, dtype: str = "float32") -> Core:
    """The recurrent memory that belongs to the type of `config`.

    Args:
      config: sizes; its type chooses the GRU.
      stoch_size: length S of the flattened stochastic state.
      action_size: length A of the action vector.
      dtype: compute type and type of the carry; parameters are float32.
    """
    hidden, size = config.hidden, stoch_size + action_size
    gru = GRUS[type(config)](hidden=hidden, deter=config.deter, dtype=dtype)
    img_in = nets.Linear(size, hidden, dtype=dtype, kernel_init="glorot")
    norm = nets.LayerNorm(hidden) if getattr(config, "norm", "none") == "layer" else None
    rows, add_bias = nets.call(img_in, "rows"), nets.call(img_in, "add_bias")
    advance = nets.call(gru)

    def init(key: Key) -> Params:
        key_input, key_norm, key_gru = jax.random.split(key, 3)
        x, h = jnp.zeros((1, hidden)), jnp.zeros((1, config.deter))
        params = {
            "img_in": img_in.init(key_input, jnp.zeros((1, size)))["params"],
            "gru": gru.init(key_gru, x, h)["params"],
        }
        return params | ({"img_in_norm": norm.init(key_norm, x)["params"]} if norm else {})

    def initial(batch: int) -> Float[Array, "B D"]:
        return jnp.zeros((batch, config.deter), dtype)

    def embed(params: Params, action: Float[Array, "*lead A"]) -> Float[Array, "*lead hidden"]:
        # [z, a] is one product in the papers; the rows of its kernel for a need no recurrence.
        return add_bias(params["img_in"], rows(params["img_in"], action, stoch_size))

    def step(
        params: Params,
        carry: Float[Array, "B D"],
        stoch: Float[Array, "B S"],
        embedded: Float[Array, "B hidden"],
        is_first: Bool[Array, " B"],
    ) -> Float[Array, "B D"]:
        h = reset(carry, initial(carry.shape[0]), is_first)
        x = rows(params["img_in"], stoch, 0) + embedded
        if norm:
            x = nets.call(norm)(params["img_in_norm"], x)
        return advance(params["gru"], nets.ACTIVATIONS[config.act](x), h)

    def deter(carry: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return carry

    return Core(init, initial, embed, step, deter, sequence_by_scan(step, deter))


def reset(carry: Any, initial: Any, is_first: Bool[Array, " B"]) -> Any:
    """The carry, with the rows of `initial` where `is_first`."""

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(is_first.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, carry, initial)


def sequence_by_scan(
    step: Callable[[Params, Any, Array, Array, Array], Any], deter: Callable[[Any], Array]
) -> Callable[[Params, Any, Array, Array, Array], tuple[Any, Array, Any]]:
    """`Core.sequence` as a scan of `Core.step`, for memories that have no parallel form."""

    def sequence(
        params: Params,
        carry: Any,
        stoch: Float[Array, "T B S"],
        embedded: Float[Array, "T B E"],
        is_first: Bool[Array, "T B"],
    ) -> tuple[Any, Float[Array, "T B D"], Any]:
        def body(params: Params, carry: Any, inputs: tuple[Array, ...]) -> tuple[Any, Any]:
            carry = step(params, carry, *inputs)
            return carry, carry

        carry, carries = backend.scan(body, params, carry, (stoch, embedded, is_first))
        return carry, deter(carries), carries

    return sequence
