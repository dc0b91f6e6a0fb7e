"""A memory without recurrence: the mean of everything since the episode began.

    y_t = W [z_{t-1}, a_t]
    h_t = tanh(mean(y_s for s in episode start..t) + b)

It is the smallest memory whose `sequence` is parallel over time: sums by an associative scan
instead of a loop. It shows what a transformer or a state-space model needs, and tests that the rest
of the library does not rely on a loop over `step`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import nets
from jaxwm.config import at_least
from jaxwm.models.recurrent import reset
from jaxwm.types import Array, Bool, Core, Float, Key, Params


@dataclasses.dataclass(frozen=True)
class RunningMeanConfig:
    """Size of the memory.

    Args:
      deter: size D of the deterministic state.
    """

    deter: int = 64

    def __post_init__(self):
        at_least(self, 1, "deter")


class Carry(NamedTuple):
    """Sums since the episode began, and the state made of them."""

    total: Float[Array, "*lead D"]
    count: Float[Array, "*lead"]
    deter: Float[Array, "*lead D"]


def core(
    config: RunningMeanConfig, stoch_size: int, action_size: int, dtype: str = "float32"
) -> Core:
    """The running mean as a `Core`.

    Args:
      config: sizes.
      stoch_size: length S of the flattened stochastic state.
      action_size: length A of the action vector.
      dtype: compute type; sums and parameters are float32.
    """

    size = stoch_size + action_size
    linear = nets.Linear(size, config.deter, dtype=dtype, kernel_init="glorot")
    rows = nets.call(linear, "rows")

    def init(key: Key) -> Params:
        return linear.init(key, jnp.zeros((1, size)))["params"]

    def initial(batch: int) -> Carry:
        state = jnp.zeros((batch, config.deter), jnp.float32)
        return Carry(state, jnp.zeros(batch, jnp.float32), state.astype(dtype))

    def embed(params: Params, action: Float[Array, "*lead A"]) -> Float[Array, "*lead D"]:
        return rows(params, action, stoch_size)

    def read(params: Params, stoch: Array, embedded: Array) -> Float[Array, "*lead D"]:
        return (rows(params, stoch, 0) + embedded).astype(jnp.float32)

    def state(params: Params, total: Array, count: Array) -> Carry:
        mean = (total / count[..., None]).astype(dtype)
        return Carry(total, count, jnp.tanh(nets.call(linear, "add_bias")(params, mean)))

    def step(
        params: Params,
        carry: Carry,
        stoch: Float[Array, "B S"],
        embedded: Float[Array, "B D"],
        is_first: Bool[Array, " B"],
    ) -> Carry:
        carry = reset(carry, initial(is_first.shape[0]), is_first)
        total = carry.total + read(params, stoch, embedded)
        return state(params, total, carry.count + 1)

    def deter(carry: Carry) -> Float[Array, "*lead D"]:
        return carry.deter

    def sequence(
        params: Params,
        carry: Carry,
        stoch: Float[Array, "T B S"],
        embedded: Float[Array, "T B D"],
        is_first: Bool[Array, "T B"],
    ) -> tuple[Carry, Float[Array, "T B D"], Carry]:
        inputs = read(params, stoch, embedded)
        started = reset(carry, initial(is_first.shape[1]), is_first[0])
        total = inputs.at[0].add(started.total)
        count = jnp.ones(is_first.shape, jnp.float32).at[0].add(started.count)
        _, total, count = jax.lax.associative_scan(_join, (is_first, total, count))
        carries = state(params, total, count)
        return jax.tree.map(lambda x: x[-1], carries), carries.deter, carries

    return Core(init, initial, embed, step, deter, sequence)


def _join(
    left: tuple[Array, Array, Array], right: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Sums over two neighbouring spans; where an episode starts in the right one, it forgets."""
    (left_first, left_total, left_count), (first, total, count) = left, right
    total = jnp.where(first[..., None], total, left_total + total)
    return left_first | first, total, jnp.where(first, count, left_count + count)
