"""Training: the whole experiment is one pytree, and two drivers take it through time.

One iteration: the agent acts on the present rows, the rows go to the replay, the environments
step, and as many updates follow as the train ratio has earned. Both drivers do this with the same
`act` and `update`:

- on the device (here), a chunk of iterations is one compiled program, environments included;
- on the host (`train_host`), simulators step in worker processes while the device learns.

`jax.vmap` over the state adds seeds; counters and replay cursor are the same for all seeds and
stay unmapped, so that slice updates and loops keep their form. `mesh` adds shards and devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import envs, mesh
from jaxwm.agent import Agent, AgentState, make_agent
from jaxwm.config import require
from jaxwm.envs import check, wrappers
from jaxwm.envs.host import limit_and_repeat
from jaxwm.mesh import P
from jaxwm.recipes import RunConfig
from jaxwm.replay import Buffer, Cursor, Replay, check_fits, replay
from jaxwm.types import (
    Array,
    Env,
    HostEnv,
    Int,
    Key,
    Latent,
    Metrics,
    Step,
    zeros,
)


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
    """A run as functions over a `TrainState`.

    Attributes:
      env: the environment: batched on the device, or on the host.
      agent: the agent, as it acts outside of the program.
      replay: the replay, of one shard.
      shapes: `() -> TrainState` of shapes, and of numpy arrays for what lies in the host's memory;
        nothing is allocated or opened.
      init: `() -> TrainState`; the key of the run's seed is an argument of the compiled code.
      resume: `TrainState -> TrainState`, a restored one made ready to go on: simulators on the
        host, whose states cannot be stored, begin new episodes.
      chunk: `TrainState -> TrainState, metrics`, `iterations` iterations; updates in place.
      compile: `() -> chunk`, compiled before it is called.
      fault: `TrainState -> str | None`, what the environments did wrong, if it ends the run.
      close: lets go of simulators.
      iterations: iterations per chunk.
      seeds: number of seeds; with more than one every leaf but the clock leads with them.
      layout: which devices hold what; with more than one shard, what is in `LEADS` leads with them.
    """

    env: Env | HostEnv
    agent: Agent
    replay: Replay
    shapes: Callable[[], TrainState]
    init: Callable[[], TrainState]
    resume: Callable[[TrainState], TrainState]
    chunk: Any
    compile: Callable[[], Callable[[TrainState], tuple[TrainState, Metrics]]]
    fault: Callable[[TrainState], str | None]
    close: Callable[[], None]
    iterations: int
    seeds: int
    layout: mesh.Layout


def make_env(config: RunConfig) -> Env | HostEnv:
    """The single environment of a run, with its wrappers.

    Raises:
      JaxwmError: if there is no such environment, or it breaks the contract of `types.Env`.
    """
    env = envs.make(config.env)
    if isinstance(env, HostEnv):
        env = limit_and_repeat(env, config.time_limit, config.action_repeat)
    else:
        if config.action_repeat > 1:
            env = wrappers.action_repeat(env, config.action_repeat)
        if config.time_limit:
            env = wrappers.time_limit(env, config.time_limit)
    check.validate(env)
    return env


def build(
    config: RunConfig,
    iterations: int | None = None,
    single: Env | HostEnv | None = None,
    devices: Sequence[Any] | None = None,
) -> Program:
    """The program of a run; nothing is allocated, opened or compiled before it is called.

    Args:
      config: the run.
      iterations: iterations per chunk; by default what `log_every` asks for.
      single: the single environment, if it is not the one that `config.env` names.
      devices: the devices to run on, as many of them as shards and seeds can be divided among; by
        default all. Simulators on the host use the first one.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces, or the replay cannot lie
        where it should, or simulators on the host should be divided into shards.
    """
    env = single or make_env(config)
    require(
        config.replay.place == "device" or isinstance(env, HostEnv),
        f"A replay in the host's memory needs simulators on the host, and {env.name} runs on the "
        "device, in one program with its replay. Leave --replay.place at device, and lower "
        "--replay.capacity if the device has too little memory.",
    )
    if isinstance(env, HostEnv):
        require(
            config.shards == 1 and jax.process_count() == 1,
            f"{env.name} runs on the host. Only what runs on the device can be divided into shards "
            "or among processes: set --shards to 1, and train in one process.",
        )
        devices = jax.devices()[:1]
    layout, part = mesh.layout(config, devices), mesh.part(config)
    agent = make_agent(config.agent, env.obs_space, env.action_space)
    row = jax.eval_shape(lambda: empty_row(env, part.envs))
    memory = replay(part.replay, row, jax.eval_shape(lambda: agent.initial(part.envs)))
    here = memory.nbytes * layout.seeds_here * layout.shards_here
    check_fits(here, place=config.replay.place)
    count = iterations or max(1, config.log_every // config.envs)
    if isinstance(env, HostEnv):
        from jaxwm.train_host import on_host  # it builds on this file

        return on_host(config, env, agent, memory, count, layout)
    return _on_device(part, env, agent, memory, count, layout)


def empty_row(env: Env | HostEnv, count: int) -> Step:
    """A row (B,) of zeros, for its shapes and types."""
    no = jnp.zeros((count,), bool)
    return Step(
        zeros(env.action_space, (count,)),
        zeros(env.obs_space, (count,)),
        jnp.zeros((count,)),
        no,
        no,
        no,
    )


def beginning(
    config: RunConfig, agent: Agent, memory: Replay, reset: Callable[[Key], tuple[Any, Step]]
) -> Callable[[Key], TrainState]:
    """`key -> TrainState` at the beginning of a run, for one seed."""

    def start(key: Key) -> TrainState:
        key_run, key_agent, key_env = jax.random.split(key, 3)
        agent_state = agent.init(key_agent)
        env_state, row = reset(key_env)
        buffer, cursor = memory.init()
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            key=key_run,
            agent=agent_state,
            env=env_state,
            row=row,
            carry=agent.initial(config.envs),
            buffer=buffer,
            episodes=Episodes(*(jnp.zeros((config.envs,)) for _ in range(2)), *_zeros(3)),
            clock=Clock(zero, zero, zero, cursor),
        )

    return start


def keys_of(config: RunConfig) -> Any:
    """The key of the run's seed, or one per seed."""
    keys = [jax.random.key(config.seed + i) for i in range(config.seeds)]
    return jnp.stack(keys) if config.seeds > 1 else keys[0]


# Which parts of a state lead with the seeds.
AXES: Any = TrainState._make(None if name == "clock" else 0 for name in TrainState._fields)

# The axes that each part of a state leads with: experience differs from shard to shard.
_OWN = ("env", "row", "carry", "buffer", "episodes")
LEADS: Any = TrainState._make(
    P() if name == "clock" else P(mesh.SHARDS, mesh.SEEDS) if name in _OWN else P(mesh.SEEDS)
    for name in TrainState._fields
)


def _on_device(
    config: RunConfig,
    single: Env,
    agent: Agent,
    memory: Replay,
    count: int,
    layout: mesh.Layout,
) -> Program:
    """The driver that keeps everything on the device: a chunk is one compiled program.

    Args:
      config: the run, of one shard.
      single: the single environment.
      agent: the agent, which knows of no shards.
      memory: the replay of one shard.
      count: iterations per chunk.
      layout: where shards and seeds lie.
    """
    env = wrappers.guard(wrappers.batch(single, config.envs))
    whole = jax.eval_shape(agent.init, jax.random.key(0)) if layout.parts else None
    leads = LEADS if whole is None else LEADS._replace(agent=mesh.learned(layout, whole))
    learner, shards = agent, mesh.shards_of(layout, whole)
    if layout.shards > 1:
        learner = make_agent(config.agent, env.obs_space, env.action_space, shards)

    def reset(key: Key) -> tuple[Any, Step]:
        state, row = env.reset(shards.own(key))
        return state, row._replace(action=zeros(env.action_space, (config.envs,)))

    iterate = _iteration(config, env, learner, memory)

    def chunk(state: TrainState) -> tuple[TrainState, Metrics]:
        episodes = state.episodes._replace(**dict(zip(SUMS, _zeros(3), strict=True)))
        sums = no_sums(state, learner, memory)
        before = state.clock.updates
        own = state._replace(key=shards.own(state.key), episodes=episodes)
        (after, sums), _ = jax.lax.scan(lambda c, _: (iterate(*c), None), (own, sums), None, count)
        ended = shards.total({name: getattr(after.episodes, name) for name in SUMS})
        metrics = metrics_of(sums, after.clock.updates - before, after.episodes._replace(**ended))
        return after._replace(key=state.key), metrics

    def fault(state: TrainState) -> str | None:
        found = mesh.fetch(state.env.fault)
        if layout.shards > 1:
            found = wrappers.first_fault(found, config.envs)
        return _seed_fault(env, found, config.seeds)

    init = beginning(config, learner, memory, reset)
    if config.seeds > 1:
        init = jax.vmap(init, out_axes=AXES)
        chunk = jax.vmap(chunk, in_axes=(AXES,), out_axes=(AXES, 0))
    init = mesh.spread(init, layout, (P(mesh.SEEDS),), leads)
    chunk = mesh.spread(chunk, layout, (leads,), (leads, P(mesh.SEEDS)))
    keys = mesh.put(keys_of(config), layout, P(mesh.SEEDS))
    start, go = functools.partial(jax.jit(init), keys), jax.jit(chunk, donate_argnums=0)

    def shapes() -> TrainState:
        return mesh.placed(jax.eval_shape(start), layout, leads)

    return Program(
        env=env,
        agent=agent,
        replay=memory,
        shapes=shapes,
        init=start,
        resume=lambda state: state,
        chunk=go,
        compile=lambda: go.lower(shapes()).compile(),
        fault=fault,
        close=lambda: None,
        iterations=count,
        seeds=config.seeds,
        layout=layout,
    )


SUMS = ("ended", "sum_return", "sum_length")


def _zeros(count: int) -> list[Array]:
    return [jnp.zeros(()) for _ in range(count)]


def no_sums(state: TrainState, agent: Agent, memory: Replay) -> Metrics:
    """Zeros to add the metrics of updates to."""
    state = state._replace(buffer=memory.shapes)  # which may not lie on the device
    like = jax.eval_shape(lambda s: _one_update(s, agent, memory)[1], state)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def metrics_of(sums: dict[str, Any], made: Any, episodes: Any, xp: Any = jnp) -> dict[str, Any]:
    """Means over a chunk, from sums over its updates and its ended episodes, in jax or numpy."""
    with np.errstate(invalid="ignore"):
        means = {name: total / xp.maximum(made, 1) for name, total in sums.items()}
        # No update, no losses: NaN says "nothing to report".
        means = {name: xp.where(made > 0, x, xp.nan) for name, x in means.items()}
        return means | {
            "episode/return": episodes.sum_return / episodes.ended,
            "episode/length": episodes.sum_length / episodes.ended,
            "episode/count": episodes.ended,
        }


def _iteration(
    config: RunConfig, env: Env, agent: Agent, memory: Replay
) -> Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]:
    """`(state, sums of metrics) -> (state, sums of metrics)`, one iteration."""
    # Whole numbers keep the account of the train ratio exact over any number of iterations.
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()

    def iterate(state: TrainState, sums: Metrics) -> tuple[TrainState, Metrics]:
        state = _act(state, env, agent, memory)
        clock = state.clock
        ready = clock.cursor.written >= memory.warmup
        credit = jnp.where(ready, clock.credit + earned, 0)
        due = credit // price
        state = state._replace(clock=clock._replace(credit=credit - due * price))
        return learn(state, sums, due, agent, memory)

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
        episodes=count_episodes(state.episodes, row),
        clock=clock._replace(iteration=clock.iteration + 1, cursor=cursor),
    )


def learn(
    state: TrainState, sums: Metrics, due: Array, agent: Agent, memory: Replay
) -> tuple[TrainState, Metrics]:
    """Makes the updates that are due, and adds up their metrics."""

    def once(_: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, sums = carry
        state, metrics = _one_update(state, agent, memory)
        return state, jax.tree.map(jnp.add, sums, metrics)

    return jax.lax.fori_loop(0, due, once, (state, sums))


def _one_update(state: TrainState, agent: Agent, memory: Replay) -> tuple[TrainState, Metrics]:
    """Samples a batch, updates the agent, writes the fresh latents back."""
    clock = state.clock
    key_sample, key_update = update_keys(state.key, clock.updates)
    window, cursor = memory.sample(state.buffer, clock.cursor, key_sample)
    learned, latents, metrics = agent.update(state.agent, window.context, window.steps, key_update)
    state = state._replace(
        agent=learned,
        buffer=memory.write_back(state.buffer, window, latents),
        clock=clock._replace(updates=clock.updates + 1, cursor=cursor),
    )
    return state, metrics


def update_keys(key: Key, updates: Array) -> tuple[Key, Key]:
    """Of the update after so many: the key that samples its batch, and the one it learns with."""
    key_sample, key_update = jax.random.split(jax.random.fold_in(key, 2 * updates + 1))
    return key_sample, key_update


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


def _seed_fault(env: Env, fault: wrappers.Fault, seeds: int) -> str | None:
    """What `wrappers.guard` met in the first seed that has met anything."""
    fault = jax.tree.map(lambda x: np.atleast_1d(np.asarray(x)), fault)
    for seed in range(seeds):
        message = wrappers.fault_message(env, jax.tree.map(lambda x, i=seed: x[i], fault))
        if message:
            return f"(seed {seed} of {seeds}) {message}" if seeds > 1 else message
    return None
