"""The block-diagonal gated recurrent core of DreamerV3 (arXiv:2301.04104).

    x0, x1, x2 = project(h), project(z), project(action)       linear, RMS norm, SiLU
    x          = SiLU(norm(block_linear([h, x0, x1, x2])))      each block: its slice of h, all of x
    r, c, u    = block_linear(x)                                thirds of every block
    h'         = sigmoid(u - 1) * tanh(sigmoid(r) * c) + (1 - sigmoid(u - 1)) * h

The state h (D) is cut into blocks that only meet through the narrow projection x0 of the whole
state, so the recurrent product costs 1/blocks of a dense one.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxwm import nets
from jaxwm.config import require
from jaxwm.models.recurrent import sequence_by_scan
from jaxwm.types import Array, Bool, Core, Float, Key, Params


@dataclasses.dataclass(frozen=True)
class BlockGRUConfig:
    """Sizes of the core.

    Args:
      deter: size D of the deterministic state.
      hidden: width of the three input projections.
      blocks: number of blocks; divides `deter`.
    """

    deter: int = 8192
    hidden: int = 1024
    blocks: int = 8

    def __post_init__(self):
        require(
            min(self.deter, self.hidden, self.blocks) >= 1 and self.deter % self.blocks == 0,
            f"The recurrent core has deter={self.deter}, hidden={self.hidden} and "
            f"blocks={self.blocks}: all must be positive and blocks must divide deter.",
        )


class BlockGRU(nn.Module):
    """The networks of the core."""

    config: BlockGRUConfig
    stoch_size: int
    action_size: int
    dtype: str = "float32"

    def setup(self):
        deter, hidden, blocks = self.config.deter, self.config.hidden, self.config.blocks
        self.in_deter = nets.Linear(deter, hidden, dtype=self.dtype)
        self.in_stoch = nets.Linear(self.stoch_size, hidden, dtype=self.dtype)
        self.in_action = nets.Linear(self.action_size, hidden, dtype=self.dtype)
        self.in_deter_norm = nets.RMSNorm(hidden)
        self.in_stoch_norm = nets.RMSNorm(hidden)
        self.in_action_norm = nets.RMSNorm(hidden)
        # Per block: its own slice of h, then the three projections that all blocks share.
        self.hidden = nets.BlockLinear(deter + 3 * hidden * blocks, deter, blocks, self.dtype)
        self.hidden_norm = nets.RMSNorm(deter)
        self.gates = nets.BlockLinear(deter, 3 * deter, blocks, self.dtype)

    def __call__(
        self, deter: Float[Array, "N D"], stoch: Float[Array, "N S"], action: Float[Array, "N A"]
    ) -> Float[Array, "N D"]:
        """One step from one state and action to the next state."""
        return self.step(deter, stoch, self.embed(action))

    def embed(self, action: Float[Array, "*lead A"]) -> Float[Array, "*lead D"]:
        """The action's share of the hidden layer, bias included."""
        # Clipped softly to [-1, 1], without a gradient through the divisor.
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        x2 = jax.nn.silu(self.in_action_norm(self.in_action(action)))
        return self.hidden.add_bias(self.hidden.shared_rows(x2, self._shared_start(2)))

    def step(
        self, deter: Float[Array, "N D"], stoch: Float[Array, "N S"], embedded: Float[Array, "N D"]
    ) -> Float[Array, "N D"]:
        """One step of the recurrence, from the embedded action."""
        x0 = jax.nn.silu(self.in_deter_norm(self.in_deter(deter)))
        x1 = jax.nn.silu(self.in_stoch_norm(self.in_stoch(stoch)))
        shared = self.hidden.shared_rows(jnp.concatenate([x0, x1], -1), self._shared_start(0))
        x = jax.nn.silu(self.hidden_norm(self.hidden.rows(deter, 0) + shared + embedded))
        reset, candidate, update = self.gates.split(x, 3)
        update = jax.nn.sigmoid(update - 1)
        return update * jnp.tanh(jax.nn.sigmoid(reset) * candidate) + (1 - update) * deter

    def _shared_start(self, index: int) -> int:
        """The row of each block's kernel at which x0, x1 or x2 begins."""
        return self.config.deter // self.config.blocks + index * self.config.hidden


def block_gru(
    config: BlockGRUConfig, stoch_size: int, action_size: int, dtype: str = "float32"
) -> Core:
    """The core as pure functions; its carry is h.

    Args:
      config: sizes.
      stoch_size: length of the flat stochastic state.
      action_size: length of the action as a vector.
      dtype: compute type.
    """
    module = BlockGRU(config, stoch_size, action_size, dtype)
    embed, advance = nets.call(module, "embed"), nets.call(module, "step")

    def init(key: Key) -> Params:
        sizes = config.deter, stoch_size, action_size
        return module.init(key, *(jnp.zeros((1, size)) for size in sizes))["params"]

    def initial(batch: int) -> Float[Array, "B D"]:
        return jnp.zeros((batch, config.deter), dtype)

    def step(
        params: Params,
        deter: Float[Array, "B D"],
        stoch: Float[Array, "B S"],
        embedded: Float[Array, "B D"],
        is_first: Bool[Array, " B"],
    ) -> Float[Array, "B D"]:
        return advance(params, jnp.where(is_first[:, None], 0, deter), stoch, embedded)

    deter = lambda carry: carry  # noqa: E731
    return Core(init, initial, embed, step, deter, sequence_by_scan(step, deter))
