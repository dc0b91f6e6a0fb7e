"""DreamerV3 with an LSTM as its recurrent core.

i, f, g, o = W [z, h, a] + b
c' = sigmoid(f + 1) * c + sigmoid(i) * tanh(g),   h' = sigmoid(o) * tanh(c')
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import nets
from jaxwm.models.recurrent import reset, sequence_by_scan
from jaxwm.recipes import RECIPES, Recipe, dreamer_v3
from jaxwm.run import run
from jaxwm.types import Core


class Carry(NamedTuple):
    hidden: jax.Array
    cell: jax.Array


def lstm(config, stoch_size, action_size, dtype="float32"):
    size = stoch_size + config.deter + action_size
    linear = nets.Linear(size, 4 * config.deter, dtype=dtype)
    rows, add_bias = nets.call(linear, "rows"), nets.call(linear, "add_bias")

    def initial(batch):
        return Carry(*jnp.zeros((2, batch, config.deter), dtype))

    def embed(params, action):  # the action's share of W, for all steps at once
        return add_bias(params, rows(params, action, stoch_size + config.deter))

    def step(params, carry, stoch, embedded, is_first):
        hidden, cell = reset(carry, initial(len(is_first)), is_first)
        gates = rows(params, jnp.concatenate([stoch, hidden], -1), 0) + embedded
        i, f, g, o = jnp.split(gates, 4, -1)
        cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return Carry(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)

    init = lambda key: linear.init(key, jnp.zeros((1, size)))["params"]
    deter = lambda carry: carry.hidden  # what the rest of the model reads of the memory
    return Core(init, initial, embed, step, deter, sequence_by_scan(step, deter))


def lstm_run(*choices):
    return dataclasses.replace(dreamer_v3.config(*choices), recipe="lstm")


lstm_agent = functools.partial(dreamer_v3.agent, core=lstm)
RECIPES["lstm"] = Recipe("lstm", dreamer_v3.Config, lstm_agent, lstm_run, dreamer_v3.PRESETS)

if __name__ == "__main__":
    config = lstm_run("toy/Memory", "debug", None, "cartpole")
    run(dataclasses.replace(config, steps=800))
