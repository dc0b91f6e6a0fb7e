"""Learning: updates from the replay, and the watch for updates that are not finite.

An update whose loss or gradient is not finite is refused, so everything a run has learned is finite
at all times. `Health` keeps the account.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.replay.device import Buffer, Cursor, Replay
from jaxwm.train.state import Account, Health, TrainState
from jaxwm.types import Agent, AgentState, Array, Key, Metrics


def learn(
    state: TrainState, due: Array, agent: Agent, memory: Replay, on_divergence: str
) -> TrainState:
    """Makes the updates that are due."""
    once = lambda _, state: update_once(state, agent, memory, on_divergence)  # noqa: E731
    return jax.lax.fori_loop(0, due, once, state)


def update_once(state: TrainState, agent: Agent, memory: Replay, on_divergence: str) -> TrainState:
    """Samples a batch, updates the agent, writes fresh memos back."""
    clock = state.clock
    key_sample, key_update = update_keys(state.key, clock.updates)
    window, cursor = memory.sample(state.buffer, clock.cursor, key_sample)
    learned, memo, metrics = agent.update(state.agent, window, key_update)
    taken, account, health = watch(
        metrics, state.account, state.health, clock.updates, on_divergence
    )
    return state._replace(
        agent=if_taken(taken, learned, state.agent),
        buffer=memory.write_back(state.buffer, window, memo, taken),
        account=account,
        health=health,
        clock=clock._replace(updates=clock.updates + 1, cursor=cursor),
    )


def update_keys(key: Key, updates: Array) -> tuple[Key, Key]:
    """The key that samples the batch of the next update, and the one it learns with.

    Args:
      key: the run's key. Its even folds are for acting and its odd ones for learning, so that no
        key is used twice.
      updates: updates made before.
    """
    key_sample, key_update = jax.random.split(jax.random.fold_in(key, 2 * updates + 1))
    return key_sample, key_update


def if_taken(taken: Array, after: AgentState, before: AgentState) -> AgentState:
    """`after` if the update was taken, else `before`."""
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)


def watched(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that must be finite: every loss but their total, and every norm of a gradient."""
    losses = sorted(x for x in metrics if x.startswith("loss/") and x != "loss/total")
    return losses + sorted(x for x in metrics if x.startswith("grad_norm"))


def watch(
    metrics: Metrics, account: Account, health: Health, updates: Array, on_divergence: str
) -> tuple[Array, Account, Health]:
    """Whether to take an update, and the accounts after it.

    Args:
      metrics: of the update.
      account: the account of metrics before it.
      health: the account of refused updates before it.
      updates: updates made before it.
      on_divergence: "skip" goes on after a refused update, anything else takes no more.
    """
    bad = jnp.array([~jnp.isfinite(metrics[name]) for name in watched(metrics)] or [False])
    stopped = (health.refused > 0) & (on_divergence != "skip")
    refused = bad.any() & ~stopped
    taken = ~bad.any() & ~stopped
    first = refused & (health.refused == 0)
    sums = jax.tree.map(lambda total, x: total + jnp.where(taken, x, 0.0), account.sums, metrics)
    return (
        taken,
        Account(account.taken + taken, sums),
        Health(
            health.refused + refused,
            jnp.where(first, updates + 1, health.first),
            jnp.where(first, jnp.argmax(bad), health.term).astype(jnp.int32),
        ),
    )


def zero_metrics(memory: Replay, agent: Agent, state: AgentState) -> Metrics:
    """Zeros to add the metrics of updates to."""

    def metrics(state: AgentState, buffer: Buffer, cursor: Cursor, key: Key) -> Metrics:
        key_sample, key_update = jax.random.split(key)
        window, _ = memory.sample(buffer, cursor, key_sample)
        return agent.update(state, window, key_update)[2]

    cursor = jax.eval_shape(memory.init)[1]
    like = jax.eval_shape(metrics, state, memory.shapes, cursor, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
