"""The whole experiment as one pytree, and the accounts that its metrics come from.

`jax.vmap` over the state adds members: seeds, and settings of a sweep. Counters and replay cursor
are the same for all members and stay unmapped, so that slice updates and loops keep their form.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.recipes import RunConfig, sweep
from jaxwm.replay.device import Buffer, Cursor, Replay
from jaxwm.types import (
    Agent,
    AgentState,
    Array,
    Env,
    HostEnv,
    Int,
    Key,
    Metrics,
    Params,
    PyTree,
    Step,
    zeros,
)

AgentOf = Callable[[dict[str, Any]], Agent]


class Clock(NamedTuple):
    """Counters, the same for all members."""

    iteration: Int[Array, ""]
    updates: Int[Array, ""]
    credit: Int[Array, ""]  # what iterations have earned and no update has used
    cursor: Cursor


class Episodes(NamedTuple):
    """Returns and lengths of the running episodes (B,), and sums over the ended ones."""

    reward: Array
    length: Array
    ended: Array
    sum_return: Array
    sum_length: Array


SUMS = ("ended", "sum_return", "sum_length")


class Health(NamedTuple):
    """Refused updates: a loss or a gradient was not finite."""

    refused: Int[Array, ""]
    first: Int[Array, ""]  # the number of the first one, counted from 1; 0 if there was none
    term: Int[Array, ""]  # which of `learn.watched` was not finite in the first one


class Account(NamedTuple):
    """Updates taken since the last line of metrics, and the sums of their metrics."""

    taken: Array
    sums: Metrics


class HostState(NamedTuple):
    """What a run with simulators on the host keeps in place of their states."""

    acting: Params  # the parameters that act; they may be older than the newest


class TrainState(NamedTuple):
    """The whole experiment."""

    key: Key
    values: dict[str, Array]  # of the swept entries of the configuration
    agent: AgentState
    env: Any
    row: Step  # (B,), the present rows
    carry: PyTree  # (B,), the agent's memory
    buffer: Buffer
    episodes: Episodes
    account: Account
    health: Health
    clock: Clock


# The axis of members in each part of a state.
AXES: Any = TrainState._make(None if name == "clock" else 0 for name in TrainState._fields)


def empty_row(env: Env | HostEnv, count: int) -> Step:
    """A row (B,) of zeros, for its shapes and types."""
    no = jnp.zeros((count,), bool)
    action, obs = zeros(env.action_space, (count,)), zeros(env.obs_space, (count,))
    return Step(action, obs, jnp.zeros((count,)), no, no, no)


def beginning(
    config: RunConfig,
    agent_of: AgentOf,
    memory: Replay,
    metrics: Callable[[Agent, AgentState], Metrics],
    reset: Callable[[Key], tuple[Any, Step]],
) -> Callable[[Key, dict[str, Array]], TrainState]:
    """`key, values -> TrainState` at the beginning of a run, for one member.

    Args:
      config: the run, or one shard of it.
      agent_of: `values -> Agent`.
      memory: the replay.
      metrics: zeros for each metric of an update.
      reset: `key -> state of the environments, first rows`.
    """

    def start(key: Key, values: dict[str, Array]) -> TrainState:
        agent = agent_of(values)
        key_run, key_agent, key_env = jax.random.split(key, 3)
        agent_state = agent.init(key_agent)
        env_state, row = reset(key_env)
        buffer, cursor = memory.init()
        zero = jnp.zeros((), jnp.int32)
        each, none = jnp.zeros((config.envs,)), jnp.zeros(())
        return TrainState(
            key=key_run,
            values=values,
            agent=agent_state,
            env=env_state,
            row=row,
            carry=agent.initial(config.envs),
            buffer=buffer,
            episodes=Episodes(each, each, none, none, none),
            account=Account(none, metrics(agent, agent_state)),
            health=Health(zero, zero, zero),
            clock=Clock(zero, zero, zero, cursor),
        )

    return start


def members_of(config: RunConfig) -> tuple[Any, dict[str, Any]]:
    """Key and swept values of the run's member, or of each."""
    keys = [jax.random.key(config.seed + i % config.seeds) for i in range(config.members)]
    values = {x: np.asarray(column, np.float32) for x, column in sweep.columns(config).items()}
    if config.members == 1:
        return keys[0], {path: column[0] for path, column in values.items()}
    return jnp.stack(keys), values


def begin_line(state: TrainState, fresh: Any, xp: Any = jnp) -> TrainState:
    """The state with sums of zero for the next line of metrics, where `fresh` is true."""
    keep = lambda x: xp.where(fresh, xp.zeros_like(x), x)  # noqa: E731
    sums = {name: keep(getattr(state.episodes, name)) for name in SUMS}
    account = jax.tree.map(keep, state.account)
    return state._replace(episodes=state.episodes._replace(**sums), account=account)


def metrics_of(account: Any, health: Any, episodes: Any, xp: Any = jnp) -> dict[str, Any]:
    """Means since the last line of metrics, over updates taken and ended episodes."""
    taken, sums = account
    with np.errstate(invalid="ignore", divide="ignore"):
        # Without an update there are no losses to report: NaN.
        means = {name: xp.where(taken > 0, total / taken, xp.nan) for name, total in sums.items()}
        return means | {
            "updates/refused": health.refused,
            "episode/return": episodes.sum_return / episodes.ended,
            "episode/length": episodes.sum_length / episodes.ended,
            "episode/count": episodes.ended,
        }


def count_episodes(episodes: Any, row: Any, xp: Any = jnp) -> Episodes:
    """The account of episodes after some rows (..., B), in jax or numpy."""
    reward = xp.where(row.is_first, 0.0, episodes.reward) + row.reward
    length = xp.where(row.is_first, 0.0, episodes.length + 1)
    last = row.is_last
    return Episodes(
        reward,
        length,
        episodes.ended + last.sum(-1),
        episodes.sum_return + xp.where(last, reward, 0.0).sum(-1),
        episodes.sum_length + xp.where(last, length, 0.0).sum(-1),
    )
