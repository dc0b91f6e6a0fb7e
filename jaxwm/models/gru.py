"""The block-diagonal gated recurrent core of DreamerV3 (arXiv:2301.04104).

One step takes the deterministic state h (D), the stochastic state z (S*K) and an action to the
next h. The state is cut into blocks that only meet through a narrow projection of the whole
state, so the recurrent product costs 1/blocks of a dense one.

What does not depend on the recurrent carry, the action's whole path, is `action_input`: it is
computed for all steps at once, and only `step` stays inside the scan. There the deterministic
state is (D, N), features first and the batch last: cutting it into blocks is then free, every
gate is one contiguous slab, and no product needs a transposition. Of few columns a CPU computes
rows instead: see `products.in_rows`.

In a dream, where actions come one at a time, the path of an action that is one of few choices has
as many outcomes: they are a table, which its one-hot multiplies.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxwm import nets_before as nets
from jaxwm import products
from jaxwm.types import Array, Float, JaxwmError


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
        if min(self.deter, self.hidden, self.blocks) < 1 or self.deter % self.blocks:
            raise JaxwmError(
                f"The recurrent core has deter={self.deter}, hidden={self.hidden} and "
                f"blocks={self.blocks}: all must be positive and blocks must divide deter."
            )


class Kernels(NamedTuple):
    """The kernels of the products inside `step`."""

    in_deter: products.Kernel  # (D, hidden)
    own: products.Kernel  # (blocks, D / blocks, D / blocks): a block's own slice of h
    shared: products.Kernel  # (inputs * hidden, D): what all blocks read
    gates: products.Kernel  # (blocks, D / blocks, 3 * D / blocks)


class BlockGRU(nn.Module):
    """`h' = u * tanh(r * c) + (1 - u) * h` with gates from a block-linear hidden layer."""

    config: BlockGRUConfig
    stoch_size: int
    action_size: int
    dtype: str = "float32"
    one_hot: bool = False  # whether actions are one of `action_size` choices, or zeros

    def setup(self):
        deter, hidden, blocks = self.config.deter, self.config.hidden, self.config.blocks
        self.in_deter = nets.Linear(deter, hidden, dtype=self.dtype)
        self.in_stoch = nets.Linear(self.stoch_size, hidden, dtype=self.dtype)
        self.in_action = nets.Linear(self.action_size, hidden, dtype=self.dtype)
        self.in_deter_norm = nets.RMSNorm(hidden, axis=0)
        self.in_stoch_norm = nets.RMSNorm(hidden)
        self.in_action_norm = nets.RMSNorm(hidden)
        # Per block: its own slice of h, then the three projections that all blocks share.
        self.hidden = nets.BlockLinear(deter + 3 * hidden * blocks, deter, blocks, self.dtype)
        self.hidden_norm = nets.RMSNorm(deter, axis=0)
        self.gates = nets.BlockLinear(deter, 3 * deter, blocks, self.dtype)

    def __call__(
        self, deter: Float[Array, "N D"], stoch: Float[Array, "N SK"], action: Float[Array, "N A"]
    ) -> Float[Array, "N D"]:
        """One step with the batch first."""
        return self.dream(*self.dream_kernels(), deter.T, stoch, action).T

    def kernels(self) -> Kernels:
        """What `step` multiplies with, laid out for all steps."""
        return self._laid_out(self._shared(0, 2))

    def dream_kernels(self) -> tuple[Kernels, Float[Array, "D 1"]]:
        """What `dream` multiplies with and what it adds, laid out for all steps."""
        if self.one_hot:
            table = self.action_input(jnp.eye(self.action_size + 1, self.action_size, -1))
            base, kernel = table[:, :1], (table[:, 1:] - table[:, :1]).T
        else:
            base, kernel = self.hidden.bias[:, None].astype(self.dtype), self._shared(2, 1)
        return self._laid_out(jnp.concatenate([self._shared(0, 2), kernel])), base

    def action_input(self, action: Float[Array, "*lead N A"]) -> Float[Array, "*lead D N"]:
        """What an action adds to the hidden layer, its bias included."""
        kernel, x2 = self._shared(2, 1).astype(self.dtype), self._embed_action(action)
        return self.hidden.add_bias(jnp.swapaxes(products.product(x2, kernel), -1, -2), axis=-2)

    def step(
        self,
        kernels: Kernels,
        deter: Float[Array, "D N"],
        stoch: Float[Array, "N SK"],
        action_input: Float[Array, "D N"],
    ) -> Float[Array, "D N"]:
        """One step of the recurrence, from the precomputed `action_input`."""
        return self._advance(kernels, deter, [self._embed_stoch(stoch)], action_input)

    def dream(
        self,
        kernels: Kernels,
        base: Float[Array, "D 1"],
        deter: Float[Array, "D N"],
        stoch: Float[Array, "N SK"],
        action: Float[Array, "N A"],
    ) -> Float[Array, "D N"]:
        """One step of the recurrence, from an action that only this step has."""
        action = action.astype(self.dtype) if self.one_hot else self._embed_action(action)
        read = [self._embed_stoch(stoch), action]
        return self._advance(kernels, deter, read, base)

    def _shared(self, first: int, count: int) -> Float[Array, "inputs D"]:
        """The kernel from some of the three projections that all blocks share."""
        hidden = self.config.hidden
        start = self.config.deter // self.config.blocks + first * hidden
        return self.hidden.shared(start, count * hidden)

    def _laid_out(self, shared: Float[Array, "inputs D"]) -> Kernels:
        size = self.config.deter // self.config.blocks
        return Kernels(
            self.in_deter.laid_out(self.config.deter),
            self.hidden.laid_out(size),
            products.kernel_of(shared, self.dtype),
            self.gates.laid_out(size),
        )

    def _embed_stoch(self, stoch: Float[Array, "N SK"]) -> Float[Array, "N hidden"]:
        return nets.silu(self.in_stoch_norm(self.in_stoch(stoch)))

    def _embed_action(self, action: Float[Array, "*lead N A"]) -> Float[Array, "*lead N hidden"]:
        # Clipped softly to [-1, 1], without a gradient through the divisor.
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        return nets.silu(self.in_action_norm(self.in_action(action)))

    def _advance(
        self,
        kernels: Kernels,
        deter: Float[Array, "D N"],
        read: list[Float[Array, "N _"]],
        added: Float[Array, "D M"],
    ) -> Float[Array, "D N"]:
        """The next state: all blocks `read` some projections; what others give is `added`."""
        blocks = self.config.blocks
        cut = (blocks, deter.shape[0] // blocks, deter.shape[1])
        x0 = self.in_deter.add_bias(products.columns(kernels.in_deter, deter), axis=0)
        x0 = nets.silu(self.in_deter_norm(x0))
        own = products.columns(kernels.own, deter.reshape(cut)).reshape(deter.shape)
        shared = products.columns(kernels.shared, jnp.concatenate([x0, *(x.T for x in read)]))
        x = nets.silu(self.hidden_norm(own + shared + added))
        bias = self.gates.bias.astype(self.dtype).reshape(blocks, 3, -1, 1)
        gates = products.columns(kernels.gates, x.reshape(cut)).reshape(blocks, 3, *cut[1:]) + bias
        # Columns lie in memory feature by feature, whatever the block; rows block by block.
        rows = products.in_rows(kernels.gates, deter)
        reset, candidate, update, old = (
            part.reshape(cut if rows else deter.shape)
            for part in (gates[:, 0], gates[:, 1], gates[:, 2], deter)
        )
        update = jax.nn.sigmoid(update - 1)
        new = update * jnp.tanh(jax.nn.sigmoid(reset) * candidate) + (1 - update) * old
        return (products.rowwise(new) if rows else new).reshape(deter.shape)
