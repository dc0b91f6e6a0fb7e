"""Training: the whole experiment is one pytree, and a chunk of iterations one compiled program.

One iteration: the agent acts on the present rows, the rows go to the replay, the environments
step, and as many updates follow as the train ratio has earned. `jax.vmap` over the state adds
seeds; counters and replay cursor are the same for all seeds and stay unmapped, so that slice
updates and loops keep their form.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import envs
from jaxwm.agent import Agent, AgentState, make_agent
from jaxwm.envs import check, wrappers
from jaxwm.recipes import RunConfig
from jaxwm.replay import Buffer, Cursor, Replay, check_fits, replay
from jaxwm.types import Array, Env, Int, Key, Latent, Metrics, Step, zeros


class Clock(NamedTuple):
    """Counters, the same for all seeds."""

    iteration: Int[Array, ""]
    updates: Int[Array, ""]
    credit: Int[Array, ""]  # part of an update earned and not made yet
    cursor: Cursor


class Episodes(NamedTuple):
    """Returns and lengths of the running episodes (B,), and sums over the ended ones."""

    reward: Array
    length: Array
    ended: Array
    sum_return: Array
    sum_length: Array


class TrainState(NamedTuple):
    """The whole experiment."""

    key: Key
    agent: AgentState
    env: Any
    row: Step  # (B,), what the agent acts on next
    carry: Latent  # (B,), what it remembers
    buffer: Buffer
    episodes: Episodes
    clock: Clock


class Program(NamedTuple):
    """A run as pure functions over a `TrainState`.

    Attributes:
      env: the batched environment.
      agent: the agent.
      replay: the replay.
      init: `() -> TrainState`; the key of the run's seed is an argument of the compiled code.
      chunk: `TrainState -> TrainState, metrics`, `iterations` iterations; updates in place.
      iterations: iterations per chunk.
      seeds: number of seeds; with more than one every leaf but the clock leads with them.
    """

    env: Env
    agent: Agent
    replay: Replay
    init: Callable[[], TrainState]
    chunk: Callable[[TrainState], tuple[TrainState, Metrics]]
    iterations: int
    seeds: int


def make_env(config: RunConfig) -> Env:
    """The single environment of a run, with its wrappers.

    Raises:
      JaxwmError: if there is no such environment, or it breaks the contract of `types.Env`.
    """
    env = envs.make(config.env)
    if config.action_repeat > 1:
        env = wrappers.action_repeat(env, config.action_repeat)
    if config.time_limit:
        env = wrappers.time_limit(env, config.time_limit)
    check.validate(env)
    return env


def build(config: RunConfig, iterations: int | None = None, single: Env | None = None) -> Program:
    """The compiled program of a run; nothing is allocated or compiled before it is called.

    Args:
      config: the run.
      iterations: iterations per chunk; by default what `log_every` asks for.
      single: the single environment, if it is not the one that `config.env` names.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces, or the device cannot hold
        the replay.
    """
    env = wrappers.guard(wrappers.batch(single or make_env(config), config.envs))
    agent = make_agent(config.agent, env.obs_space, env.action_space)
    first_row = jax.eval_shape(env.reset, jax.random.key(0))[1]
    latent = jax.eval_shape(lambda: agent.initial(config.envs))
    memory = replay(config.replay, first_row, latent)
    check_fits(memory.nbytes * config.seeds)
    count = iterations or max(1, config.log_every // config.envs)

    def init(key: Key) -> TrainState:
        key_run, key_agent, key_env = jax.random.split(key, 3)
        env_state, row = env.reset(key_env)
        buffer, cursor = memory.init()
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            key=key_run,
            agent=agent.init(key_agent),
            env=env_state,
            row=row._replace(action=zeros(env.action_space, (config.envs,))),
            carry=agent.initial(config.envs),
            buffer=buffer,
            episodes=Episodes(*(jnp.zeros((config.envs,)) for _ in range(2)), *_zeros(3)),
            clock=Clock(zero, zero, zero, cursor),
        )

    iterate = _iteration(config, env, agent, memory)

    def chunk(state: TrainState) -> tuple[TrainState, Metrics]:
        episodes = state.episodes._replace(**dict(zip(SUMS, _zeros(3), strict=True)))
        update_shapes = jax.eval_shape(lambda s: _one_update(s, agent, memory)[1], state)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), update_shapes)
        before = state.clock.updates
        carry = (state._replace(episodes=episodes), sums)
        (state, sums), _ = jax.lax.scan(lambda c, _: (iterate(*c), None), carry, None, count)
        made = state.clock.updates - before
        metrics = {name: total / jnp.maximum(made, 1) for name, total in sums.items()}
        # No update, no losses: NaN says "nothing to report".
        metrics = {name: jnp.where(made > 0, x, jnp.nan) for name, x in metrics.items()}
        ended = state.episodes.ended
        metrics["episode/return"] = state.episodes.sum_return / ended
        metrics["episode/length"] = state.episodes.sum_length / ended
        metrics["episode/count"] = ended
        return state, metrics

    keys = [jax.random.key(config.seed + i) for i in range(config.seeds)]
    key = keys[0]
    if config.seeds > 1:
        key = jnp.stack(keys)
        axes: Any = TrainState._make(None if name == "clock" else 0 for name in TrainState._fields)
        init = jax.vmap(init, out_axes=axes)
        chunk = jax.vmap(chunk, in_axes=(axes,), out_axes=(axes, 0))
    start, go = functools.partial(jax.jit(init), key), jax.jit(chunk, donate_argnums=0)
    return Program(env, agent, memory, start, go, count, config.seeds)


SUMS = ("ended", "sum_return", "sum_length")


def _zeros(count: int) -> list[Array]:
    return [jnp.zeros(()) for _ in range(count)]


def _iteration(
    config: RunConfig, env: Env, agent: Agent, memory: Replay
) -> Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]:
    """`(state, sums of metrics) -> (state, sums of metrics)`, one iteration."""
    # Whole numbers keep the account of the train ratio exact over any number of iterations.
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()

    def iterate(state: TrainState, sums: Metrics) -> tuple[TrainState, Metrics]:
        state = _act(state, env, agent, memory)
        clock = state.clock
        ready = memory.ready(clock.cursor)
        credit = jnp.where(ready, clock.credit + earned, 0)
        due = credit // price
        state = state._replace(clock=clock._replace(credit=credit - due * price))

        def learn(_: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            state, metrics = _one_update(state, agent, memory)
            return state, jax.tree.map(jnp.add, sums, metrics)

        return jax.lax.fori_loop(0, due, learn, (state, sums))

    return iterate


def _act(state: TrainState, env: Env, agent: Agent, memory: Replay) -> TrainState:
    """Acts on the present rows, stores them with their latents, steps the environments."""
    clock = state.clock
    # Even numbers are for acting, odd ones for learning: no key is used twice.
    key = jax.random.fold_in(state.key, 2 * clock.iteration)
    key_act, key_env = jax.random.split(key)
    carry, action = agent.act(state.agent.params, state.carry, state.row, key_act)
    buffer, cursor = memory.add(state.buffer, clock.cursor, state.row, carry)
    env_state, row = env.step(state.env, action, key_env)
    return state._replace(
        env=env_state,
        row=row,
        carry=carry,
        buffer=buffer,
        episodes=_count_episodes(state.episodes, row),
        clock=clock._replace(iteration=clock.iteration + 1, cursor=cursor),
    )


def _one_update(state: TrainState, agent: Agent, memory: Replay) -> tuple[TrainState, Metrics]:
    """Samples a batch, updates the agent, writes the fresh latents back."""
    clock = state.clock
    key = jax.random.fold_in(state.key, 2 * clock.updates + 1)
    key_sample, key_update = jax.random.split(key)
    window, cursor = memory.sample(state.buffer, clock.cursor, key_sample)
    learned, latents, metrics = agent.update(state.agent, window.context, window.steps, key_update)
    state = state._replace(
        agent=learned,
        buffer=memory.write_back(state.buffer, window, latents),
        clock=clock._replace(updates=clock.updates + 1, cursor=cursor),
    )
    return state, metrics


def _count_episodes(episodes: Episodes, row: Step) -> Episodes:
    reward = jnp.where(row.is_first, 0.0, episodes.reward) + row.reward
    length = jnp.where(row.is_first, 0.0, episodes.length + 1)
    last = row.is_last
    return Episodes(
        reward,
        length,
        episodes.ended + last.sum(),
        episodes.sum_return + jnp.where(last, reward, 0.0).sum(),
        episodes.sum_length + jnp.where(last, length, 0.0).sum(),
    )
