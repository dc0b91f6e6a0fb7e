"""Training: the whole experiment is one pytree, and two drivers take it through time.

One iteration: the agent acts on the present rows, the rows go to the replay, the environments
step, and as many updates follow as the train ratio has earned. Both drivers do this with the same
`act` and `update`:

- on the device (here), a chunk of iterations is one compiled program, environments included;
- on the host (`train_host`), simulators step in worker processes while the device learns.

`jax.vmap` over the state adds members (seeds, and settings of a sweep); counters and replay cursor
are the same for all of them and stay unmapped, so that slice updates and loops keep their form.
`mesh` adds shards and devices.

An update whose loss or gradient is not finite is refused: whatever a run has learned is finite at
all times. `Health` keeps the account.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import backend, compiler, envs
from jaxwm.agent import Agent, AgentState, make_agent
from jaxwm.config import require
from jaxwm.envs import check, wrappers
from jaxwm.envs.host import limit_and_repeat
from jaxwm.optim import resolve
from jaxwm.recipes import RunConfig, sweep
from jaxwm.replay.device import Buffer, Cursor, Replay, check_fits, replay
from jaxwm.train import mesh
from jaxwm.train.mesh import P
from jaxwm.types import (
    ALONE,
    Array,
    Box,
    Env,
    HostEnv,
    Int,
    Key,
    Latent,
    Metrics,
    Shards,
    Step,
    as_dict,
    zeros,
)


class Clock(NamedTuple):
    """Counters, the same for all members."""

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


class Health(NamedTuple):
    """Updates that were refused, because a loss or the gradient was not finite."""

    refused: Int[Array, ""]
    first: Int[Array, ""]  # the number of the first one, counted from 1; 0 if there was none
    term: Int[Array, ""]  # what was not finite in it: a place in `watched`


class Account(NamedTuple):
    """Updates taken since the last line of metrics, and the sums of their metrics."""

    taken: Array
    sums: Metrics


class TrainState(NamedTuple):
    """The whole experiment."""

    key: Key
    values: dict[str, Array]  # of the swept entries of the configuration
    agent: AgentState
    env: Any
    row: Step  # (B,), what the agent acts on next
    carry: Latent  # (B,), what it remembers
    buffer: Buffer
    episodes: Episodes
    account: Account
    health: Health
    clock: Clock


class Chunk(NamedTuple):
    """Some iterations, one after the other; the state is updated in place.

    Attributes:
      function: `TrainState, count, fresh -> TrainState, metrics`, jitted or compiled.
      iterations: the usual count, which makes up a line of metrics.
      temporary: bytes that a compiled one needs beside the state, if the backend tells.
    """

    function: Callable[..., tuple[TrainState, Any]]
    iterations: int
    temporary: int = 0

    def __call__(
        self, state: TrainState, count: int | None = None, fresh: bool = True
    ) -> tuple[TrainState, Any]:
        """The state after `count` iterations, and the metrics since the last fresh start."""
        count = self.iterations if count is None else count
        return self.function(state, np.int32(count), np.bool_(fresh))


class Program(NamedTuple):
    """A run as functions over a `TrainState`.

    Attributes:
      env: the environment: batched on the device, or on the host.
      agent: the agent, as it acts outside of the program, without a sweep's values.
      agent_of: `values -> Agent`, with the values of swept entries.
      replay: the replay, of one shard.
      shapes: `() -> TrainState` of shapes, and of numpy arrays for what lies in the host's memory;
        nothing is allocated or opened.
      init: `() -> TrainState`; the key of the run's seed is an argument of the compiled code.
      resume: `TrainState -> TrainState`, a restored one made ready to go on: simulators on the
        host, whose states cannot be stored, begin new episodes.
      chunk: takes a state through some iterations; how many is no part of the program.
      compile: `() -> chunk`, compiled before it is called.
      fault: `TrainState -> str | None`, what the environments did wrong, if it ends the run.
      close: lets go of simulators.
      iterations: iterations between two lines of metrics.
      layout: which devices hold what; with more than one member every leaf but the clock leads with
        them, with more than one shard what is in `LEADS` with those.
    """

    env: Env | HostEnv
    agent: Agent
    agent_of: Callable[[dict[str, Any]], Agent]
    replay: Replay
    shapes: Callable[[], TrainState]
    init: Callable[[], TrainState]
    resume: Callable[[TrainState], TrainState]
    chunk: Chunk
    compile: Callable[[], Chunk]
    fault: Callable[[TrainState], str | None]
    close: Callable[[], None]
    iterations: int
    layout: mesh.Layout


def make_env(config: RunConfig) -> Env | HostEnv:
    """The single environment of a run, with its wrappers; it takes boxes in [-1, 1].

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
    boxes = [x for x in as_dict(env.action_space).values() if isinstance(x, Box)]
    if isinstance(env, Env) and any(np.isfinite([*wrappers.bounds(x)]).all() for x in boxes):
        return wrappers.normalize_action(env)
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
      iterations: iterations between two lines of metrics; by default what `log_every` asks for.
      single: the single environment, if it is not the one that `config.env` names.
      devices: the devices to run on, as many of them as shards and seeds can be divided among; by
        default all. Simulators on the host use the first one.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces, or the replay cannot lie
        where it should, or simulators on the host should be divided into shards.
    """
    env = single or make_env(config)
    # Here, and not where a configuration is stored: a resumed run may be longer.
    config = dataclasses.replace(config, agent=resolve(config.agent, config.updates))
    require(
        not jax.config.values["jax_debug_nans"],
        "Metrics of nothing, such as the return where no episode ended, are NaN, at which "
        "JAX_DEBUG_NANS would end the run. Unset it: every update is looked at for NaN, and what "
        "was not finite first is told (--on-divergence).",
    )
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
    layout, of_shard = mesh.layout(config, devices), mesh.shard_config(config)
    agent_of = agents(config, env)
    agent = agent_of({})
    row = jax.eval_shape(lambda: empty_row(env, of_shard.envs))
    memory = replay(of_shard.replay, row, jax.eval_shape(lambda: agent.initial(of_shard.envs)))
    here = memory.nbytes * layout.members_here * layout.shards_here
    check_fits(here * layout.sharing, place=config.replay.place)
    count = iterations or max(1, config.log_every // config.envs)
    if isinstance(env, HostEnv):
        from jaxwm.train.host import on_host  # it builds on this file

        return on_host(config, env, agent_of, memory, count, layout)
    return _on_device(of_shard, env, agent_of, memory, count, layout)


def agents(
    config: RunConfig, env: Env | HostEnv, shards: Shards = ALONE
) -> Callable[[dict[str, Any]], Agent]:
    """`values -> Agent`, the agent of a run with the values of some entries of its configuration.

    Args:
      config: the run.
      env: its environment, for the spaces.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces.
    """
    spaces = env.obs_space, env.action_space
    plain = make_agent(config.agent, *spaces, shards)

    def made(values: dict[str, Any]) -> Agent:
        return make_agent(sweep.put(config, values).agent, *spaces, shards) if values else plain

    # Whole updates: members meet nowhere within, and each has the cache for itself.
    update = backend.one_by_one(lambda values, *given: made(values).update(*given))

    def agent_of(values: dict[str, Any]) -> Agent:
        agent = made(values)
        if config.members == 1 or shards is not ALONE:
            return agent
        return agent._replace(update=functools.partial(update, values))

    return agent_of


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
    config: RunConfig,
    agent_of: Callable[[dict[str, Any]], Agent],
    memory: Replay,
    reset: Callable[[Key], tuple[Any, Step]],
) -> Callable[[Key, dict[str, Array]], TrainState]:
    """`key, values -> TrainState` at the beginning of a run, for one member."""

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
            account=Account(none, _no_sums(agent, memory, agent_state)),
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


# Which parts of a state lead with the members.
AXES: Any = TrainState._make(None if name == "clock" else 0 for name in TrainState._fields)

# The axes that each part of a state leads with: experience differs from shard to shard.
_OWN = ("env", "row", "carry", "buffer", "episodes")
LEADS: Any = TrainState._make(
    P() if name == "clock" else P(mesh.SHARDS, mesh.MEMBERS) if name in _OWN else P(mesh.MEMBERS)
    for name in TrainState._fields
)


def _on_device(
    config: RunConfig,
    single: Env,
    agent_of: Callable[[dict[str, Any]], Agent],
    memory: Replay,
    count: int,
    layout: mesh.Layout,
) -> Program:
    """The driver that keeps everything on the device: a chunk is one compiled program.

    Args:
      config: the run, of one shard.
      single: the single environment.
      agent_of: `values -> Agent`, which knows of no shards.
      memory: the replay of one shard.
      count: iterations between two lines of metrics.
      layout: where shards and members lie.
    """
    env = wrappers.guard(wrappers.batch(single, config.envs))
    whole = None
    if layout.shard_params:
        whole = jax.eval_shape(agent_of({}).init, jax.random.key(0))
    leads = LEADS if whole is None else LEADS._replace(agent=mesh.learned(layout, whole))
    shards = mesh.shards_of(layout, whole)
    learner_of = agents(config, env, shards) if layout.shards > 1 else agent_of

    def reset(key: Key) -> tuple[Any, Step]:
        state, row = env.reset(shards.own(key))
        return state, row._replace(action=zeros(env.action_space, (config.envs,)))

    def chunk(state: TrainState, count: Array, fresh: Array) -> tuple[TrainState, Metrics]:
        iterate = _iteration(config, env, learner_of(state.values), memory)
        own = begin_line(state._replace(key=shards.own(state.key)), fresh)
        # How often is no part of the program: chunks of any length share it.
        after = jax.lax.fori_loop(0, count, lambda _, state: iterate(state), own)
        ended = shards.total({name: getattr(after.episodes, name) for name in SUMS})
        metrics = metrics_of(after.account, after.health, after.episodes._replace(**ended))
        return after._replace(key=state.key), metrics

    def fault(state: TrainState) -> str | None:
        found = mesh.fetch(state.env.fault)
        if layout.shards > 1:
            found = wrappers.first_fault(found, config.envs)
        return _member_fault(env, found, config.members)

    init = beginning(config, learner_of, memory, reset)
    if config.members > 1:
        init = jax.vmap(init, out_axes=AXES)
        chunk = jax.vmap(chunk, in_axes=(AXES, None, None), out_axes=(AXES, 0))
    each = P(mesh.MEMBERS)
    init = jax.jit(mesh.spread(init, layout, (each, each), leads))
    chunk = mesh.spread(chunk, layout, (leads, P(), P()), (leads, each))
    start = lambda: init(*mesh.put(members_of(config), layout, each))  # noqa: E731
    go = compiler.jit(chunk, donate_argnums=0)

    def shapes() -> TrainState:
        return mesh.placed(jax.eval_shape(init, *members_of(config)), layout, leads)

    def compiled() -> Chunk:
        program = go.lower(shapes(), NUMBER, TRUTH).compile()
        return Chunk(program, count, temporary_bytes(program))

    return Program(
        env=env,
        agent=agent_of({}),
        agent_of=agent_of,
        replay=memory,
        shapes=shapes,
        init=start,
        resume=lambda state: state,
        chunk=Chunk(go, count),
        compile=compiled,
        fault=fault,
        close=lambda: None,
        iterations=count,
        layout=layout,
    )


NUMBER, TRUTH = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results; 0 if unknown."""
    found = compiled.memory_analysis()
    return int(found.temp_size_in_bytes) if found else 0


SUMS = ("ended", "sum_return", "sum_length")


def _no_sums(agent: Agent, memory: Replay, state: AgentState) -> Metrics:
    """Zeros to add the metrics of updates to."""

    def metrics(state: AgentState, buffer: Buffer, cursor: Cursor, key: Key) -> Metrics:
        key_sample, key_update = jax.random.split(key)
        window, _ = memory.sample(buffer, cursor, key_sample)
        return agent.update(state, window.context, window.steps, key_update)[2]

    cursor = jax.eval_shape(memory.init)[1]
    like = jax.eval_shape(metrics, state, memory.shapes, cursor, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def begin_line(state: Any, fresh: Any, xp: Any = jnp) -> Any:
    """A state whose sums for the next line of metrics begin anew, if they should."""
    keep = lambda x: xp.where(fresh, xp.zeros_like(x), x)  # noqa: E731
    sums = {name: keep(getattr(state.episodes, name)) for name in SUMS}
    account = jax.tree.map(keep, state.account)
    return state._replace(episodes=state.episodes._replace(**sums), account=account)


def metrics_of(account: Any, health: Any, episodes: Any, xp: Any = jnp) -> dict[str, Any]:
    """Means since the last line of metrics, over updates taken and ended episodes."""
    taken, sums = account
    with np.errstate(invalid="ignore", divide="ignore"):
        # No update, no losses: NaN says "nothing to report".
        means = {name: xp.where(taken > 0, total / taken, xp.nan) for name, total in sums.items()}
        return means | {
            "updates/refused": health.refused,
            "episode/return": episodes.sum_return / episodes.ended,
            "episode/length": episodes.sum_length / episodes.ended,
            "episode/count": episodes.ended,
        }


def _iteration(
    config: RunConfig, env: Env, agent: Agent, memory: Replay
) -> Callable[[TrainState], TrainState]:
    """`state -> state`, one iteration."""
    # Whole numbers keep the account of the train ratio exact over any number of iterations.
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()

    def iterate(state: TrainState) -> TrainState:
        state = _act(state, env, agent, memory)
        clock = state.clock
        ready = clock.cursor.written >= memory.warmup
        credit = jnp.where(ready, clock.credit + earned, 0)
        due = credit // price
        state = state._replace(clock=clock._replace(credit=credit - due * price))
        return learn(state, due, agent, memory, config.on_divergence)

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
    state: TrainState, due: Array, agent: Agent, memory: Replay, on_divergence: str
) -> TrainState:
    """Makes the updates that are due."""
    once = lambda _, state: _one_update(state, agent, memory, on_divergence)  # noqa: E731
    return jax.lax.fori_loop(0, due, once, state)


def _one_update(state: TrainState, agent: Agent, memory: Replay, on_divergence: str) -> TrainState:
    """Samples a batch, updates the agent, writes the fresh latents back."""
    clock = state.clock
    key_sample, key_update = update_keys(state.key, clock.updates)
    window, cursor = memory.sample(state.buffer, clock.cursor, key_sample)
    learned, latents, metrics = agent.update(state.agent, window.context, window.steps, key_update)
    taken, account, health = watch(
        metrics, state.account, state.health, clock.updates, on_divergence
    )
    return state._replace(
        agent=if_taken(taken, learned, state.agent),
        buffer=memory.write_back(state.buffer, window, latents, taken),
        account=account,
        health=health,
        clock=clock._replace(updates=clock.updates + 1, cursor=cursor),
    )


def if_taken(taken: Array, after: AgentState, before: AgentState) -> AgentState:
    """What was learned, or else what was known before."""
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)


def watched(metrics: Mapping[str, Any]) -> list[str]:
    """What must be finite: the gradient and every loss, of which the total is the sum."""
    losses = {name for name in metrics if name.startswith("loss/")} - {"loss/total"}
    return [*sorted(losses), "grad_norm"]


def watch(
    metrics: Metrics, account: Account, health: Health, updates: Array, on_divergence: str
) -> tuple[Array, Account, Health]:
    """Whether to take an update, and the accounts after it.

    Args:
      metrics: of the update.
      account: the account of metrics before it.
      health: the account of refused updates before it.
      updates: updates made before it.
      on_divergence: "skip" goes on after one that was not finite, anything else takes no more.
    """
    bad = jnp.stack([~jnp.isfinite(metrics[name]) for name in watched(metrics)])
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


def _member_fault(env: Env, fault: wrappers.Fault, members: int) -> str | None:
    """What `wrappers.guard` met in the first member that has met anything."""
    fault = jax.tree.map(lambda x: np.atleast_1d(np.asarray(x)), fault)
    for index in range(members):
        message = wrappers.fault_message(env, jax.tree.map(lambda x, i=index: x[i], fault))
        if message:
            return f"(member {index} of {members}) {message}" if members > 1 else message
    return None
