"""The driver for simulators on the host, which step in worker processes while the device learns.

Acting must not wait for learning, so it uses the parameters from before the newest round of
updates, and the replay and that round are left to a thread of their own: jax runs what one thread
asks for in order, but the work of several side by side where the device can. Which parameters act
when depends on counters alone, never on how fast anything was, and so does the train ratio.

The replay lies on the device, or in the host's memory (`replay_host`): two `_Store`s.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import compiler, train
from jaxwm.agent import Agent, AgentState
from jaxwm.envs.host import Pool, TooManyFaults
from jaxwm.recipes import RunConfig
from jaxwm.replay import host as replay_host
from jaxwm.replay.device import Buffer, Cursor, Packed, Replay, close_abandoned, pack, unpack
from jaxwm.train.mesh import Layout
from jaxwm.types import Action, Array, HostEnv, Key, Latent, Params, Step


class HostState(NamedTuple):
    """What a run with simulators on the host keeps in place of their states."""

    acting: Params  # the parameters that act, older than the newest by one round of updates


def on_host(
    config: RunConfig,
    env: HostEnv,
    agent_of: Callable[[dict[str, Any]], Agent],
    memory: Replay,
    count: int,
    layout: Layout,
) -> train.Program:
    """The program of a run with simulators on the host.

    Args:
      config: the run.
      env: what to simulate.
      agent_of: `values -> Agent`, with the values of swept entries.
      memory: the replay, wherever it lies.
      count: iterations between two lines of metrics.
      layout: the one device that learns.
    """
    many = config.members > 1
    _, values = train.members_of(config)
    earned, price = config.replay.updates_per_iteration(config.envs).as_integer_ratio()
    stores = {"device": _store_on_device, "host": _store_in_host_memory}
    store = stores[config.replay.place](config, agent_of, memory)

    def act(
        params: Params,
        carry: Latent,
        row: Step,
        key: Key,
        iteration: Array,
        values: dict[str, Array],
    ) -> tuple[Latent, Action]:
        key_act, _ = jax.random.split(jax.random.fold_in(key, 2 * iteration))
        return agent_of(values).act(params, carry, row, key_act)

    start: Any = train.beginning(
        config, agent_of, memory, lambda key: ((), train.empty_row(env, config.envs))
    )
    if many:
        start = jax.vmap(start, out_axes=train.AXES)
        act = jax.vmap(act, in_axes=(0, 0, 0, 0, None, 0))
    begin = jax.jit(store.start(start))
    start = lambda: begin(*train.members_of(config))  # noqa: E731
    jits = (jax.jit(act), *store.jits)
    opened: list[Pool] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def rows(row: Step) -> Step:
        """The pool's rows, with an axis of members if there is one."""
        if not many:
            return row
        lead = (config.members, config.envs)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), row)

    def flat(action: Any) -> Any:
        """Actions without that axis, as the pool takes them."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), action) if many else action

    def resume(state: train.TrainState) -> train.TrainState:
        close()
        seed = np.random.SeedSequence((config.seed, int(state.clock.iteration)))
        opened.append(
            Pool(env, config.members * config.envs, config.host, int(seed.generate_state(1)[0]))
        )
        episodes = jax.tree.map(np.zeros_like, jax.device_get(state.episodes))
        acting = HostState(state.agent.params)
        return state._replace(env=acting, row=rows(opened[0].reset()), episodes=episodes)

    def shapes() -> train.TrainState:
        like = store.shapes(jax.eval_shape(start))
        return like._replace(env=HostState(like.agent.params))

    def chunk_of(act: Any, *others: Any) -> Any:
        add, learn = store.join(*others)

        def chunk(
            state: train.TrainState, count: Any, fresh: Any
        ) -> tuple[train.TrainState, dict[str, Any]]:
            pool, begun, waited = opened[0], time.perf_counter(), 0.0
            clock = jax.tree.map(int, jax.device_get(state.clock))
            iteration, credit, updates = clock.iteration, clock.credit, clock.updates
            state = train.begin_line(state, fresh, np)
            row, carry, acting = state.row, state.carry, state.env.acting
            episodes = jax.device_get(state.episodes)
            params, rest = state.agent.params, _without_acting(state)

            def keep(row: Step, carry: Latent) -> None:
                nonlocal rest
                buffer, cursor = add(rest.buffer, rest.clock.cursor, row, carry)
                rest = rest._replace(buffer=buffer, clock=rest.clock._replace(cursor=cursor))

            def improve(due: int) -> Params:
                nonlocal params, rest
                params, rest = learn(params, state.key, rest, np.int32(due))
                return jax.block_until_ready(params)

            with ThreadPoolExecutor(1, "learner") as learner:
                jobs, newest = [], None
                for _ in range(count):
                    carry, action = act(acting, carry, row, state.key, np.int32(iteration), values)
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
                    episodes = train.count_episodes(episodes, row, np)
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
            account, health, ended = jax.device_get((state.account, state.health, episodes))
            metrics = train.metrics_of(account, health, ended, np)
            metrics["host/waiting"] = waited / (time.perf_counter() - begun)
            metrics["host/faults"] = sum(pool.faults.values())
            metrics["memory/simulators"] = pool.resident_bytes()
            return state, metrics

        return chunk

    def compiled() -> train.Chunk:
        like = shapes()
        arguments = (
            (like.agent.params, like.carry, like.row, like.key, train.NUMBER, values),
            *store.arguments(like),
        )
        programs = [f.lower(*a).compile() for f, a in zip(jits, arguments, strict=True)]
        temporary = max(map(train.temporary_bytes, programs))
        return train.Chunk(chunk_of(*programs), count, temporary)

    return train.Program(
        env=env,
        agent=agent_of({}),
        agent_of=agent_of,
        replay=memory,
        shapes=shapes,
        init=lambda: resume(store.init(start())),
        resume=resume,
        chunk=train.Chunk(chunk_of(*jits), count),
        compile=compiled,
        fault=lambda state: opened[0].failure if opened else None,
        close=close,
        iterations=count,
        layout=layout,
    )


class _Store(NamedTuple):
    """A replay, and learning from it, for the learner's thread.

    Attributes:
      jits: the functions to compile.
      arguments: `train.TrainState -> arguments of each`, all of them shapes.
      join: `*jits -> add, learn` with
        `add: buffer, cursor, rows, latents -> buffer, cursor` and
        `learn: params, key, rest, due -> params, rest`, where rest is what `_without_acting`
        leaves. Buffer and rest are used up; params are not, because they act at the same time.
      start: `function -> function`, of those that make a `train.TrainState` on the device.
      init: `train.TrainState -> train.TrainState`, what came from there made whole.
      shapes: the same for shapes.
    """

    jits: tuple[Any, ...]
    arguments: Callable[[train.TrainState], tuple[Any, ...]]
    join: Callable[..., tuple[Any, Any]]
    start: Callable[[Any], Any] = lambda function: function
    init: Callable[[train.TrainState], train.TrainState] = lambda state: state
    shapes: Callable[[train.TrainState], train.TrainState] = lambda like: like


def _store_on_device(
    config: RunConfig, agent_of: Callable[[dict[str, Any]], Agent], memory: Replay
) -> _Store:
    """All updates of a round are one program."""

    def learn(
        params: Params, key: Key, rest: train.TrainState, due: Array
    ) -> tuple[Params, train.TrainState]:
        state = rest._replace(agent=rest.agent._replace(params=params), key=key)
        agent = agent_of(state.values)
        state = train.learn(state, due, agent, memory, config.on_divergence)
        return state.agent.params, _without_acting(state)

    add: Any = memory.add
    if config.members > 1:
        add = jax.vmap(add, in_axes=(0, None, 0, 0), out_axes=(0, None))
        learn = jax.vmap(learn, in_axes=(0, 0, train.AXES, None), out_axes=(0, train.AXES))

    def arguments(like: train.TrainState) -> tuple[Any, ...]:
        return (
            (like.buffer, like.clock.cursor, like.row, like.carry),
            (like.agent.params, like.key, _without_acting(like), train.NUMBER),
        )

    jits = (jax.jit(add, donate_argnums=0), compiler.jit(learn, donate_argnums=2))
    return _Store(jits, arguments, lambda add, learn: (add, learn))


def _store_in_host_memory(
    config: RunConfig, agent_of: Callable[[dict[str, Any]], Agent], memory: Replay
) -> _Store:
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
            env, start, cursor = memory.choose(cursor, train.update_keys(key, update)[0])
            return cursor, (env, start, cursor.online)

        return jax.lax.scan(one, cursor, updates + jnp.arange(most))[1]

    def update(
        params: Params,
        key: Key,
        others: _Others,
        values: dict[str, Array],
        made: Array,
        context: Packed,
        steps: Step,
    ) -> tuple[Params, _Others, Packed, Array]:
        before, carry = others.agent._replace(params=params), unpack(context, classes)
        key_update = train.update_keys(key, made)[1]
        after, latents, metrics = agent_of(values).update(
            before, carry, close_abandoned(steps), key_update
        )
        taken, account, health = train.watch(
            metrics, others.account, others.health, made, config.on_divergence
        )
        after = train.if_taken(taken, after, before)
        others = _Others(after._replace(params=()), account, health)
        return after.params, others, pack(latents), taken

    classes = jax.eval_shape(lambda: agent_of({}).initial(1)).stoch.shape[-1]
    packing, lead = pack, ()
    if config.members > 1:
        lead = (config.members,)
        packing = jax.vmap(pack)
        choose = jax.vmap(choose, in_axes=(0, None, None), out_axes=(1, 1, None))
        update = jax.vmap(update, in_axes=(0, 0, 0, 0, None, 0, 0))

    def arguments(like: train.TrainState) -> tuple[Any, ...]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        window, _ = jax.eval_shape(memory.sample, memory.shapes, like.clock.cursor, key)
        context, steps = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype),
            (jax.eval_shape(pack, window.context), window.steps),
        )
        others = _Others(like.agent._replace(params=()), like.account, like.health)
        number = train.NUMBER
        return (
            (like.carry,),
            (like.key, number, like.clock.cursor),
            (like.agent.params, like.key, others, like.values, number, context, steps),
        )

    def join(pack: Any, choose: Any, update: Any) -> tuple[Any, Any]:
        def add(buffer: Buffer, cursor: Cursor, rows: Step, latents: Any) -> Any:
            written = int(cursor.written)
            replay_host.add(buffer, written, rows, jax.device_get(pack(latents)))
            return buffer, cursor._replace(written=np.int32(written + 1))

        def learn(params: Params, key: Any, rest: train.TrainState, due: Any) -> Any:
            buffer, clock = rest.buffer, rest.clock
            others = _Others(rest.agent, rest.account, rest.health)
            made = int(clock.updates)
            env, start, online = jax.device_get(choose(key, np.int32(made), clock.cursor))
            steps = jax.device_put(replay_host.read(buffer, env[0], start[0], length))
            for i in range(due):
                context = replay_host.context(buffer, env[i], start[i])
                params, others, fresh, taken = update(
                    params, key, others, rest.values, np.int32(made + i), context, steps
                )
                if i + 1 < due:  # while the device computes
                    following = replay_host.read(buffer, env[i + 1], start[i + 1], length)
                    steps = jax.device_put(following)
                fresh, taken = jax.device_get((fresh, taken))
                replay_host.write_back(buffer, env[i], start[i], fresh, taken)
            cursor = clock.cursor._replace(online=online[due - 1])
            clock = clock._replace(updates=np.int32(made + due), cursor=cursor)
            return params, rest._replace(**others._asdict(), clock=clock)

        return add, learn

    def with_buffer(make: Any, state: train.TrainState) -> train.TrainState:
        return state._replace(buffer=make(memory.shapes, lead))

    return _Store(
        (jax.jit(packing), jax.jit(choose), compiler.jit(update, donate_argnums=2)),
        arguments,
        join,
        start=lambda start: lambda *members: start(*members)._replace(buffer=()),
        init=functools.partial(with_buffer, replay_host.empty),
        shapes=functools.partial(with_buffer, replay_host.outline),
    )


class _Others(NamedTuple):
    """What an update changes in place when the replay lies with the host."""

    agent: AgentState  # but for the parameters
    account: train.Account
    health: train.Health


def _without_acting(state: train.TrainState) -> train.TrainState:
    """What learning changes in place: all but what acting reads at the same time."""
    agent = state.agent._replace(params=())
    return state._replace(key=(), agent=agent, env=(), row=(), carry=(), episodes=())
