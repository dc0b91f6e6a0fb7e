"""Training: the whole experiment is one pytree, and two drivers take it through time.

One iteration: the agent acts on the present rows, the rows go to the replay, the environments
step, and as many updates follow as the train ratio has earned. Both drivers do this with the same
`act` and `update`:

- on the device, a chunk of iterations is one compiled program, environments included;
- on the host, simulators step in worker processes while the device learns (`envs.host`); the
  replay then lies on the device too, or in the host's memory (`host_replay`).

`jax.vmap` over the state adds seeds; counters and replay cursor are the same for all seeds and
stay unmapped, so that slice updates and loops keep their form.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import envs, host_replay
from jaxwm.agent import Agent, AgentState, make_agent
from jaxwm.config import require
from jaxwm.envs import check, wrappers
from jaxwm.envs.host import Pool, TooManyFaults, limit_and_repeat
from jaxwm.recipes import RunConfig
from jaxwm.replay import (
    Buffer,
    Cursor,
    Packed,
    Replay,
    check_fits,
    close_abandoned,
    pack,
    replay,
    unpack,
)
from jaxwm.types import (
    Action,
    Array,
    Env,
    HostEnv,
    Int,
    Key,
    Latent,
    Metrics,
    Params,
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


class HostState(NamedTuple):
    """What a run with simulators on the host keeps in place of their states."""

    acting: Params  # the parameters that act, older than the newest by one round of updates


class Program(NamedTuple):
    """A run as functions over a `TrainState`.

    Attributes:
      env: the environment: batched on the device, or on the host.
      agent: the agent.
      replay: the replay.
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
    config: RunConfig, iterations: int | None = None, single: Env | HostEnv | None = None
) -> Program:
    """The program of a run; nothing is allocated, opened or compiled before it is called.

    Args:
      config: the run.
      iterations: iterations per chunk; by default what `log_every` asks for.
      single: the single environment, if it is not the one that `config.env` names.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces, or the replay cannot lie
        where it should.
    """
    env = single or make_env(config)
    require(
        config.replay.place == "device" or isinstance(env, HostEnv),
        f"A replay in the host's memory needs simulators on the host, and {env.name} runs on the "
        "device, in one program with its replay. Leave --replay.place at device, and lower "
        "--replay.capacity if the device has too little memory.",
    )
    agent = make_agent(config.agent, env.obs_space, env.action_space)
    row = jax.eval_shape(lambda: _empty_row(env, config.envs))
    memory = replay(config.replay, row, jax.eval_shape(lambda: agent.initial(config.envs)))
    check_fits(memory.nbytes * config.seeds, place=config.replay.place)
    count = iterations or max(1, config.log_every // config.envs)
    if isinstance(env, HostEnv):
        return _on_host(config, env, agent, memory, count)
    return _on_device(config, env, agent, memory, count)


def _empty_row(env: Env | HostEnv, count: int) -> Step:
    no = jnp.zeros((count,), bool)
    return Step(
        zeros(env.action_space, (count,)),
        zeros(env.obs_space, (count,)),
        jnp.zeros((count,)),
        no,
        no,
        no,
    )


def _start(
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


def _keys(config: RunConfig) -> Any:
    """The key of the run's seed, or one per seed."""
    keys = [jax.random.key(config.seed + i) for i in range(config.seeds)]
    return jnp.stack(keys) if config.seeds > 1 else keys[0]


# Which parts of a state lead with the seeds.
_AXES: Any = TrainState._make(None if name == "clock" else 0 for name in TrainState._fields)


def _on_device(config: RunConfig, single: Env, agent: Agent, memory: Replay, count: int) -> Program:
    """The driver that keeps everything on the device: a chunk is one compiled program."""
    env = wrappers.guard(wrappers.batch(single, config.envs))

    def reset(key: Key) -> tuple[Any, Step]:
        state, row = env.reset(key)
        return state, row._replace(action=zeros(env.action_space, (config.envs,)))

    iterate = _iteration(config, env, agent, memory)

    def chunk(state: TrainState) -> tuple[TrainState, Metrics]:
        episodes = state.episodes._replace(**dict(zip(SUMS, _zeros(3), strict=True)))
        sums = _no_sums(state, agent, memory)
        before = state.clock.updates
        carry = (state._replace(episodes=episodes), sums)
        (state, sums), _ = jax.lax.scan(lambda c, _: (iterate(*c), None), carry, None, count)
        return state, _metrics(sums, state.clock.updates - before, state.episodes)

    def fault(state: TrainState) -> str | None:
        return _seed_fault(env, state.env.fault, config.seeds)

    init = _start(config, agent, memory, reset)
    if config.seeds > 1:
        init = jax.vmap(init, out_axes=_AXES)
        chunk = jax.vmap(chunk, in_axes=(_AXES,), out_axes=(_AXES, 0))
    start, go = functools.partial(jax.jit(init), _keys(config)), jax.jit(chunk, donate_argnums=0)
    shapes = functools.partial(jax.eval_shape, start)
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
    )


def _on_host(config: RunConfig, env: HostEnv, agent: Agent, memory: Replay, count: int) -> Program:
    """The driver for simulators on the host, which step while the device learns.

    Acting must not wait for learning, so it uses the parameters from before the newest round of
    updates, and the replay and that round are left to a thread of their own: jax runs what one
    thread asks for in order, but the work of several side by side where the device can. Which
    parameters act when depends on counters alone, never on how fast anything was, and so does the
    train ratio.
    """
    many = config.seeds > 1
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()
    stores = {"device": _store_on_device, "host": _store_in_host_memory}
    store = stores[config.replay.place](config, agent, memory)

    def act(
        params: Params, carry: Latent, row: Step, key: Key, iteration: Array
    ) -> tuple[Latent, Action]:
        key_act, _ = jax.random.split(jax.random.fold_in(key, 2 * iteration))
        return agent.act(params, carry, row, key_act)

    start: Any = _start(config, agent, memory, lambda key: ((), _empty_row(env, config.envs)))
    no_sums = functools.partial(_no_sums, agent=agent, memory=memory)
    if many:
        start = jax.vmap(start, out_axes=_AXES)
        no_sums = jax.vmap(no_sums, in_axes=(_AXES,))
        act = jax.vmap(act, in_axes=(0, 0, 0, 0, None))
    start = functools.partial(jax.jit(store.start(start)), _keys(config))
    no_sums, jits = jax.jit(no_sums), (jax.jit(act), *store.jits)
    opened: list[Pool] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def rows(row: Step) -> Step:
        """The pool's rows, with an axis of seeds if there is one."""
        if not many:
            return row
        return jax.tree.map(lambda x: x.reshape(config.seeds, config.envs, *x.shape[1:]), row)

    def flat(action: Any) -> Any:
        """Actions without that axis, as the pool takes them."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), action) if many else action

    def resume(state: TrainState) -> TrainState:
        close()
        seed = np.random.SeedSequence((config.seed, int(state.clock.iteration)))
        opened.append(
            Pool(env, config.seeds * config.envs, config.host, int(seed.generate_state(1)[0]))
        )
        episodes = jax.tree.map(np.zeros_like, jax.device_get(state.episodes))
        acting = HostState(state.agent.params)
        return state._replace(env=acting, row=rows(opened[0].reset()), episodes=episodes)

    def shapes() -> TrainState:
        like = store.shapes(jax.eval_shape(start))
        return like._replace(env=HostState(like.agent.params))

    def chunk_of(act: Any, *others: Any) -> Any:
        add, learn = store.join(*others)

        def chunk(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
            pool, begun, waited = opened[0], time.perf_counter(), 0.0
            clock = jax.tree.map(int, jax.device_get(state.clock))
            iteration, credit, updates = clock.iteration, clock.credit, clock.updates
            row, carry, acting = state.row, state.carry, state.env.acting
            nothing = np.zeros((config.seeds,) if many else (), np.float32)
            episodes = state.episodes._replace(**dict.fromkeys(SUMS, nothing))
            params, rest = state.agent.params, _without_acting(state)
            sums = no_sums(state._replace(buffer=()))

            def keep(row: Step, carry: Latent) -> None:
                nonlocal rest
                buffer, cursor = add(rest.buffer, rest.clock.cursor, row, carry)
                rest = rest._replace(buffer=buffer, clock=rest.clock._replace(cursor=cursor))

            def improve(due: int) -> Params:
                nonlocal params, rest, sums
                params, rest, sums = learn(params, state.key, rest, sums, np.int32(due))
                return jax.block_until_ready(params)

            with ThreadPoolExecutor(1, "learner") as learner:
                jobs, newest = [], None
                for _ in range(count):
                    carry, action = act(acting, carry, row, state.key, np.int32(iteration))
                    pool.send(flat(jax.device_get(action)))
                    jobs.append(learner.submit(keep, row, carry))
                    iteration += 1
                    credit = credit + earned if iteration >= memory.warmup else 0
                    due, credit = divmod(credit, price)
                    if due:
                        acting = newest.result() if newest else params
                        newest = learner.submit(improve, due)
                        jobs.append(newest)
                        updates += due
                    paused = time.perf_counter()
                    try:
                        row = rows(pool.receive())
                    except TooManyFaults:
                        break
                    waited += time.perf_counter() - paused
                    episodes = _count_episodes(episodes, row, np)
                for job in jobs:
                    job.result()  # raises what went wrong in the other thread
            state = rest._replace(
                key=state.key,
                agent=rest.agent._replace(params=params),
                env=HostState(acting),
                row=row,
                carry=carry,
                episodes=jax.tree.map(np.float32, episodes),
                clock=jax.tree.map(
                    jnp.int32, rest.clock._replace(iteration=iteration, credit=credit)
                ),
            )
            metrics = _metrics(jax.device_get(sums), updates - clock.updates, episodes, np)
            metrics["host/waiting"] = waited / (time.perf_counter() - begun)
            metrics["host/faults"] = sum(pool.faults.values())
            metrics["memory/simulators"] = pool.resident_bytes()
            return state, metrics

        return chunk

    def compile_chunk() -> Any:
        like = shapes()
        sums = jax.eval_shape(no_sums, like._replace(buffer=()))
        arguments = (
            (like.agent.params, like.carry, like.row, like.key, _NUMBER),
            *store.arguments(like, sums),
        )
        return chunk_of(*(f.lower(*a).compile() for f, a in zip(jits, arguments, strict=True)))

    return Program(
        env=env,
        agent=agent,
        replay=memory,
        shapes=shapes,
        init=lambda: resume(store.init(start())),
        resume=resume,
        chunk=chunk_of(*jits),
        compile=compile_chunk,
        fault=lambda state: opened[0].failure if opened else None,
        close=close,
        iterations=count,
        seeds=config.seeds,
    )


class _Store(NamedTuple):
    """A replay, and learning from it, for the learner's thread.

    Attributes:
      jits: the functions to compile.
      arguments: `TrainState, sums -> arguments of each`, all of them shapes.
      join: `*jits -> add, learn` with
        `add: buffer, cursor, rows, latents -> buffer, cursor` and
        `learn: params, key, rest, sums, due -> params, rest, sums`, where rest is what
        `_without_acting` leaves. Buffer, rest and sums are used up; params are not, because they
        act at the same time.
      start: `function -> function`, of those that make a `TrainState` on the device.
      init: `TrainState -> TrainState`, what came from there made whole.
      shapes: the same for shapes.
    """

    jits: tuple[Any, ...]
    arguments: Callable[[TrainState, Any], tuple[Any, ...]]
    join: Callable[..., tuple[Any, Any]]
    start: Callable[[Any], Any] = lambda function: function
    init: Callable[[TrainState], TrainState] = lambda state: state
    shapes: Callable[[TrainState], TrainState] = lambda like: like


_NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def _store_on_device(config: RunConfig, agent: Agent, memory: Replay) -> _Store:
    """All updates of a round are one program."""

    def learn(
        params: Params, key: Key, rest: TrainState, sums: Metrics, due: Array
    ) -> tuple[Params, TrainState, Metrics]:
        state = rest._replace(agent=rest.agent._replace(params=params), key=key)
        state, sums = _learn(state, sums, due, agent, memory)
        return state.agent.params, _without_acting(state), sums

    add: Any = memory.add
    if config.seeds > 1:
        add = jax.vmap(add, in_axes=(0, None, 0, 0), out_axes=(0, None))
        learn = jax.vmap(learn, in_axes=(0, 0, _AXES, 0, None), out_axes=(0, _AXES, 0))

    def arguments(like: TrainState, sums: Any) -> tuple[Any, ...]:
        return (
            (like.buffer, like.clock.cursor, like.row, like.carry),
            (like.agent.params, like.key, _without_acting(like), sums, _NUMBER),
        )

    jits = (jax.jit(add, donate_argnums=0), jax.jit(learn, donate_argnums=(2, 3)))
    return _Store(jits, arguments, lambda add, learn: (add, learn))


def _store_in_host_memory(config: RunConfig, agent: Agent, memory: Replay) -> _Store:
    """Each update is a program, which is handed its batch and hands back the fresh latents.

    Which windows the updates of a round take depends on counters and keys alone, so one program
    says it for all of them, before the first: the rows of the next batch are gathered while the
    device computes.
    """
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()
    most = -(-earned // price)  # updates in one round
    length = config.replay.batch_length

    def choose(key: Key, updates: Array, cursor: Cursor) -> tuple[Array, Array, Array]:
        """Environment, first row (U, B) and the queue's counter afterwards (U,), for U updates."""

        def one(cursor: Cursor, update: Array) -> tuple[Cursor, tuple[Array, Array, Array]]:
            env, start, cursor = memory.choose(cursor, _update_keys(key, update)[0])
            return cursor, (env, start, cursor.online)

        return jax.lax.scan(one, cursor, updates + jnp.arange(most))[1]

    def update(
        params: Params,
        key: Key,
        others: AgentState,
        sums: Metrics,
        made: Array,
        context: Packed,
        steps: Step,
    ) -> tuple[Params, AgentState, Metrics, Packed]:
        state, carry = others._replace(params=params), unpack(context, classes)
        key_update = _update_keys(key, made)[1]
        state, latents, metrics = agent.update(state, carry, close_abandoned(steps), key_update)
        sums = jax.tree.map(jnp.add, sums, metrics)
        return state.params, state._replace(params=()), sums, pack(latents)

    classes = jax.eval_shape(lambda: agent.initial(1)).stoch.shape[-1]
    packing, lead = pack, ()
    if config.seeds > 1:
        lead = (config.seeds,)
        packing = jax.vmap(pack)
        choose = jax.vmap(choose, in_axes=(0, None, None), out_axes=(1, 1, None))
        update = jax.vmap(update, in_axes=(0, 0, 0, 0, None, 0, 0))

    def arguments(like: TrainState, sums: Any) -> tuple[Any, ...]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        window, _ = jax.eval_shape(memory.sample, memory.shapes, like.clock.cursor, key)
        context, steps = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype),
            (jax.eval_shape(pack, window.context), window.steps),
        )
        agent_state = like.agent._replace(params=())
        return (
            (like.carry,),
            (like.key, _NUMBER, like.clock.cursor),
            (like.agent.params, like.key, agent_state, sums, _NUMBER, context, steps),
        )

    def join(pack: Any, choose: Any, update: Any) -> tuple[Any, Any]:
        def add(buffer: Buffer, cursor: Cursor, rows: Step, latents: Any) -> Any:
            written = int(cursor.written)
            host_replay.add(buffer, written, rows, jax.device_get(pack(latents)))
            return buffer, cursor._replace(written=np.int32(written + 1))

        def learn(params: Params, key: Any, rest: TrainState, sums: Any, due: Any) -> Any:
            buffer, clock, others = rest.buffer, rest.clock, rest.agent
            made = int(clock.updates)
            env, start, online = jax.device_get(choose(key, np.int32(made), clock.cursor))
            steps = jax.device_put(host_replay.read(buffer, env[0], start[0], length))
            for i in range(due):
                context = host_replay.context(buffer, env[i], start[i])
                params, others, sums, fresh = update(
                    params, key, others, sums, np.int32(made + i), context, steps
                )
                if i + 1 < due:  # while the device computes
                    following = host_replay.read(buffer, env[i + 1], start[i + 1], length)
                    steps = jax.device_put(following)
                host_replay.write_back(buffer, env[i], start[i], jax.device_get(fresh))
            cursor = clock.cursor._replace(online=online[due - 1])
            clock = clock._replace(updates=np.int32(made + due), cursor=cursor)
            return params, rest._replace(agent=others, clock=clock), sums

        return add, learn

    def with_buffer(make: Any, state: TrainState) -> TrainState:
        return state._replace(buffer=make(memory.shapes, lead))

    return _Store(
        (jax.jit(packing), jax.jit(choose), jax.jit(update, donate_argnums=(2, 3))),
        arguments,
        join,
        start=lambda start: lambda keys: start(keys)._replace(buffer=()),
        init=functools.partial(with_buffer, host_replay.empty),
        shapes=functools.partial(with_buffer, host_replay.outline),
    )


def _without_acting(state: TrainState) -> TrainState:
    """What learning changes in place: all but what acting reads at the same time."""
    agent = state.agent._replace(params=())
    return state._replace(key=(), agent=agent, env=(), row=(), carry=(), episodes=())


SUMS = ("ended", "sum_return", "sum_length")


def _zeros(count: int) -> list[Array]:
    return [jnp.zeros(()) for _ in range(count)]


def _no_sums(state: TrainState, agent: Agent, memory: Replay) -> Metrics:
    """Zeros to add the metrics of updates to."""
    state = state._replace(buffer=memory.shapes)  # which may not lie on the device
    like = jax.eval_shape(lambda s: _one_update(s, agent, memory)[1], state)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _metrics(sums: dict[str, Any], made: Any, episodes: Any, xp: Any = jnp) -> dict[str, Any]:
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
        return _learn(state, sums, due, agent, memory)

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


def _learn(
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
    key_sample, key_update = _update_keys(state.key, clock.updates)
    window, cursor = memory.sample(state.buffer, clock.cursor, key_sample)
    learned, latents, metrics = agent.update(state.agent, window.context, window.steps, key_update)
    state = state._replace(
        agent=learned,
        buffer=memory.write_back(state.buffer, window, latents),
        clock=clock._replace(updates=clock.updates + 1, cursor=cursor),
    )
    return state, metrics


def _update_keys(key: Key, updates: Array) -> tuple[Key, Key]:
    """Of the update after so many: the key that samples its batch, and the one it learns with."""
    key_sample, key_update = jax.random.split(jax.random.fold_in(key, 2 * updates + 1))
    return key_sample, key_update


def _count_episodes(episodes: Any, row: Any, xp: Any = jnp) -> Episodes:
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
