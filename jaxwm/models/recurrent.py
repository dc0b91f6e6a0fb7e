"""The recurrent memories of PlaNet, Dreamer V1 and Dreamer V2: three different GRUs.

Each has a dense input layer in front and reads the previous stochastic state z and the action a
that led to this row:

    x  = act(W [z, a] + b)                  `img_in`; Dreamer V2 may put a LayerNorm before act
    h' = gru(x, h)

The GRUs differ in where the reset gate acts, in their biases and in which gate keeps the old state.
Each cell below is written as in its paper's code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.config import at_least
from jaxwm.models import layers
from jaxwm.models.layers import ACTS, Act
from jaxwm.types import Array, Bool, Float, Key, Params

Cell = Callable[[Params, Array, Array], Array]


class Core(NamedTuple):
    """A recurrent memory as pure functions. A carry is a pytree with leading batch axes.

    Attributes:
      init: `key -> params`.
      initial: `batch -> carry` at the start of an episode.
      embed: `params, action (..., A) -> (..., E)`, the share of the input that depends on actions
        alone. Callers compute it for all steps at once, outside of their scans.
      step: `params, carry (B), stoch (B, S), embedded (B, E), is_first (B) -> carry`. `is_first`
        resets the carry; the caller sets `stoch` and the action to zero there.
      deter: `carry (...) -> (..., D)`, what the rest of the model reads.
      sequence: `params, carry (B), stoch (T, B, S), embedded (T, B, E), is_first (T, B) -> carry
        (B), deter (T, B, D), carries (T, B) | None`.
    """

    init: Callable[[Key], Params]
    initial: Callable[[int], Any]
    embed: Callable[[Params, Array], Array]
    step: Callable[[Params, Any, Array, Array, Array], Any]
    deter: Callable[[Any], Array]
    sequence: Callable[[Params, Any, Array, Array, Array], tuple[Any, Array, Any]]


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
      norm: whether the input layer has a LayerNorm. The GRU always has one.
    """

    deter: int = 1024
    hidden: int = 1024
    act: Act = "elu"
    norm: bool = False

    def __post_init__(self):
        at_least(self, 1, "deter", "hidden")


GRUConfig = PlanetGRUConfig | KerasGRUConfig | LayerNormGRUConfig


def planet_cell(
    params: Params, x: Float[Array, "B hidden"], h: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """The GRU of PlaNet, which resets the state before the candidate's product.

        r, u = sigmoid(W_ru [x, h] + b_ru)
        c    = tanh(W_c [x, r * h] + b_c)
        h'   = u * h + (1 - u) * c

    Source: tf.contrib.rnn.GRUBlockCell, used in PlaNet (arXiv:1811.04551).
    """
    reset, update = jnp.split(
        jax.nn.sigmoid(layers.dense(params["gates"], jnp.concatenate([x, h], -1))), 2, -1
    )
    candidate = layers.dense(params["candidate"], jnp.concatenate([x, reset * h], -1))
    return update * h + (1 - update) * jnp.tanh(candidate)


def planet_cell_init(key: Key, hidden: int, deter: int) -> Params:
    """Glorot-uniform kernels; the gates start with a bias of one, which keeps the old state."""
    key_gates, key_candidate = jax.random.split(key)
    return {
        "gates": layers.dense_init(key_gates, hidden + deter, 2 * deter, bias=1.0),
        "candidate": layers.dense_init(key_candidate, hidden + deter, deter),
    }


def keras_cell(
    params: Params, x: Float[Array, "B hidden"], h: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """The GRU of Dreamer V1, which resets after the recurrent product and has two biases.

        x_z, x_r, x_c = W x + b
        h_z, h_r, h_c = U h + d
        z  = sigmoid(x_z + h_z),   r = sigmoid(x_r + h_r)
        c  = tanh(x_c + r * h_c)
        h' = z * h + (1 - z) * c

    Source: tf.keras.layers.GRUCell with `reset_after`, used in Dreamer (arXiv:1912.01603).
    """
    x_z, x_r, x_c = jnp.split(layers.dense(params["input"], x), 3, -1)
    h_z, h_r, h_c = jnp.split(layers.dense(params["recurrent"], h), 3, -1)
    update, reset = jax.nn.sigmoid(x_z + h_z), jax.nn.sigmoid(x_r + h_r)
    candidate = jnp.tanh(x_c + reset * h_c)
    return update * h + (1 - update) * candidate


def keras_cell_init(key: Key, hidden: int, deter: int) -> Params:
    """Glorot-uniform input kernel, recurrent kernel with orthonormal rows, zero biases."""
    key_input, key_recurrent = jax.random.split(key)
    orthogonal = jax.nn.initializers.orthogonal()(key_recurrent, (deter, 3 * deter), jnp.float32)
    return {
        "input": layers.dense_init(key_input, hidden, 3 * deter),
        "recurrent": {"kernel": orthogonal, "bias": jnp.zeros(3 * deter)},
    }


def layer_norm_cell(
    params: Params, x: Float[Array, "B hidden"], h: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """The GRU of Dreamer V2: one product and one LayerNorm over all gates together.

        r, c, u = LayerNorm(W [x, h] + b)
        c  = tanh(sigmoid(r) * c)
        u  = sigmoid(u - 1)                 starts by keeping the old state
        h' = u * c + (1 - u) * h

    Source: DreamerV2 (arXiv:2010.02193) and its code.
    """
    parts = layers.dense(params["gates"], jnp.concatenate([x, h], -1))
    reset, candidate, update = jnp.split(layers.layer_norm(params["norm"], parts), 3, -1)
    candidate = jnp.tanh(jax.nn.sigmoid(reset) * candidate)
    update = jax.nn.sigmoid(update - 1)
    return update * candidate + (1 - update) * h


def layer_norm_cell_init(key: Key, hidden: int, deter: int) -> Params:
    """A Glorot-uniform kernel, a zero bias and the LayerNorm."""
    return {
        "gates": layers.dense_init(key, hidden + deter, 3 * deter),
        "norm": layers.layer_norm_init(3 * deter),
    }


CELLS: dict[type, tuple[Cell, Callable[[Key, int, int], Params]]] = {
    PlanetGRUConfig: (planet_cell, planet_cell_init),
    KerasGRUConfig: (keras_cell, keras_cell_init),
    LayerNormGRUConfig: (layer_norm_cell, layer_norm_cell_init),
}


def core(config: GRUConfig, stoch_size: int, action_size: int, dtype: str = "float32") -> Core:
    """The recurrent memory that belongs to the type of `config`.

    Args:
      config: sizes; its type chooses the GRU.
      stoch_size: length S of the flattened stochastic state.
      action_size: length A of the action vector.
      dtype: compute type and type of the carry; parameters are float32.
    """
    cell, cell_init = CELLS[type(config)]
    norm = isinstance(config, LayerNormGRUConfig) and config.norm

    def init(key: Key) -> Params:
        key_input, key_cell = jax.random.split(key)
        inputs = layers.dense_init(key_input, stoch_size + action_size, config.hidden)
        params = {"img_in": inputs, "gru": cell_init(key_cell, config.hidden, config.deter)}
        return params | ({"img_in_norm": layers.layer_norm_init(config.hidden)} if norm else {})

    def initial(batch: int) -> Float[Array, "B D"]:
        return jnp.zeros((batch, config.deter), dtype)

    def embed(params: Params, action: Float[Array, "*lead A"]) -> Float[Array, "*lead hidden"]:
        # [z, a] is one product in the paper; its rows for the action need no recurrence.
        kernel = params["img_in"]["kernel"][stoch_size:]
        return layers.dense(params["img_in"] | {"kernel": kernel}, action.astype(dtype))

    def step(
        params: Params,
        carry: Float[Array, "B D"],
        stoch: Float[Array, "B S"],
        embedded: Float[Array, "B hidden"],
        is_first: Bool[Array, " B"],
    ) -> Float[Array, "B D"]:
        h = reset(carry, initial(carry.shape[0]), is_first)
        kernel = params["img_in"]["kernel"][:stoch_size]
        x = layers.product(stoch.astype(dtype), kernel) + embedded
        return cell(params["gru"], ACTS[config.act](layers.normed(params, "img_in_norm", x)), h)

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
        def body(carry: Any, inputs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
            carry = step(params, carry, *inputs)
            return carry, carry

        carry, carries = jax.lax.scan(body, carry, (stoch, embedded, is_first))
        return carry, deter(carries), carries

    return sequence
