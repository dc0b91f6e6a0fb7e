"""Where a run with simulators on the host keeps its replay: with the device or with the host.

Both learn the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import backend
from jaxwm.recipes import RunConfig
from jaxwm.replay import host
from jaxwm.replay.config import Rhythm
from jaxwm.replay.device import Buffer, Cursor, Replay, close_abandoned, places
from jaxwm.train.learn import if_taken, learn, update_keys, watch
from jaxwm.train.program import NUMBER
from jaxwm.train.state import AXES, Account, AgentOf, Health, TrainState
from jaxwm.types import AgentState, Array, Key, Params, PyTree, Step, Window


class Store(NamedTuple):
    """A replay, and learning from it, for the learner's thread.

    Attributes:
      jits: the functions to compile.
      arguments: `TrainState -> arguments of each`, all of them shapes.
      join: `*jits -> add, learn` with
        `add: buffer, cursor, rows, memo -> buffer, cursor` and
        `learn: params, key, rest, due -> params, rest`, where rest is what `without_acting`
        leaves. They use up buffer and rest, but not the params, which act at the same time.
      start: `function -> function`, for those that make a `TrainState` on the device.
      init: `TrainState -> TrainState`, adds what does not lie on the device.
      shapes: the same for shapes.
    """

    jits: tuple[Any, ...]
    arguments: Callable[[TrainState], tuple[Any, ...]]
    join: Callable[..., tuple[Any, Any]]
    start: Callable[[Any], Any] = lambda function: function
    init: Callable[[TrainState], TrainState] = lambda state: state
    shapes: Callable[[TrainState], TrainState] = lambda like: like


def without_acting(state: TrainState) -> TrainState:
    """What learning changes in place: everything but what acting reads at the same time."""
    agent = state.agent._replace(params=())
    return state._replace(key=(), agent=agent, env=(), row=(), carry=(), episodes=())


def on_device(config: RunConfig, agent_of: AgentOf, memory: Replay, rhythm: Rhythm) -> Store:
    """A replay in the device's memory: all updates of a round are one program."""

    def several(
        params: Params, key: Key, rest: TrainState, due: Array
    ) -> tuple[Params, TrainState]:
        state = rest._replace(agent=rest.agent._replace(params=params), key=key)
        state = learn(state, due, agent_of(state.values), memory, config.on_divergence)
        return state.agent.params, without_acting(state)

    add: Any = memory.add
    if config.members > 1:
        add = jax.vmap(add, in_axes=(0, None, 0, 0), out_axes=(0, None))
        several = jax.vmap(several, in_axes=(0, 0, AXES, None), out_axes=(0, AXES))

    def arguments(like: TrainState) -> tuple[Any, ...]:
        lead = (config.members,) if config.members > 1 else ()
        memo = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, x.shape[0], *x.shape[2:]), x.dtype),
            memory.shapes.memo,
        )
        return (
            (like.buffer, like.clock.cursor, like.row, memo),
            (like.agent.params, like.key, without_acting(like), NUMBER),
        )

    jits = (jax.jit(add, donate_argnums=0), backend.jit(several, donate_argnums=2))
    return Store(jits, arguments, lambda add, several: (add, several))


class _Changed(NamedTuple):
    """What an update changes in place when the replay lies with the host."""

    agent: AgentState  # without the parameters
    account: Account
    health: Health


def on_host(config: RunConfig, agent_of: AgentOf, memory: Replay, rhythm: Rhythm) -> Store:
    """A replay in the host's memory: each update is a program from a batch to fresh memos.

    Which windows the updates of a round take depends on counters and keys alone, so one program
    chooses for all of them before the first, or for the first `rhythm.most` of many: the host
    gathers the rows of the next batch while the device computes.
    """
    lead = (config.members,) if config.members > 1 else ()
    choose = _chooser(memory, rhythm.most)
    update = _updater(config, agent_of)
    if lead:
        choose = jax.vmap(choose, in_axes=(0, None, None), out_axes=(1, 1, None))
        update = jax.vmap(update, in_axes=(0, 0, 0, 0, None, 0))

    def arguments(like: TrainState) -> tuple[Any, ...]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        window, _ = jax.eval_shape(memory.sample, memory.shapes, like.clock.cursor, key)
        window = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), window)
        changed = _Changed(like.agent._replace(params=()), like.account, like.health)
        return (
            (like.key, NUMBER, like.clock.cursor),
            (like.agent.params, like.key, changed, like.values, NUMBER, window),
        )

    def with_buffer(make: Any, state: TrainState) -> TrainState:
        return state._replace(buffer=make(memory.shapes, lead))

    return Store(
        (jax.jit(choose), backend.jit(update, donate_argnums=2)),
        arguments,
        lambda choose, update: (_add, _learner(memory, rhythm.most, choose, update)),
        start=lambda start: lambda *members: start(*members)._replace(buffer=()),
        init=functools.partial(with_buffer, host.empty),
        shapes=functools.partial(with_buffer, host.outline),
    )


def _chooser(memory: Replay, most: int) -> Callable[[Key, Array, Cursor], tuple[Array, ...]]:
    """`key, updates, cursor -> env (U, B), first row (U, B), the queue's counter after each (U,)`.

    Args:
      memory: the replay.
      most: updates U in a round.
    """

    def choose(key: Key, updates: Array, cursor: Cursor) -> tuple[Array, Array, Array]:
        def one(cursor: Cursor, update: Array) -> tuple[Cursor, tuple[Array, Array, Array]]:
            env, start, cursor = memory.choose(cursor, update_keys(key, update)[0])
            return cursor, (env, start, cursor.online)

        return jax.lax.scan(one, cursor, updates + jnp.arange(most))[1]

    return choose


def _updater(config: RunConfig, agent_of: AgentOf) -> Callable[..., Any]:
    """`params, key, changed, values, updates made, window -> params, changed, memo, taken`."""

    def update(
        params: Params,
        key: Key,
        changed: _Changed,
        values: dict[str, Array],
        made: Array,
        window: Window,
    ) -> tuple[Params, _Changed, PyTree, Array]:
        before = changed.agent._replace(params=params)
        window = window._replace(steps=close_abandoned(window.steps))
        after, memo, metrics = agent_of(values).update(before, window, update_keys(key, made)[1])
        taken, account, health = watch(
            metrics, changed.account, changed.health, made, config.on_divergence
        )
        after = if_taken(taken, after, before)
        return after.params, _Changed(after._replace(params=()), account, health), memo, taken

    return update


def _add(buffer: Buffer, cursor: Cursor, rows: Step, memo: PyTree) -> tuple[Buffer, Cursor]:
    written = int(cursor.written)
    host.add(buffer, written, rows, jax.device_get(memo))
    return buffer, cursor._replace(written=np.int32(written + 1))


def _learner(memory: Replay, most: int, choose: Any, update: Any) -> Callable[..., Any]:
    """`params, key, rest, due -> params, rest`: makes the updates of a round one by one."""
    length, newest = memory.length, memory.data == "newest"

    def learn(params: Params, key: Any, rest: TrainState, due: Any) -> tuple[Params, TrainState]:
        for done in range(0, due, most):
            params, rest = some(params, key, rest, min(most, due - done))
        return params, rest

    def some(params: Params, key: Any, rest: TrainState, due: Any) -> tuple[Params, TrainState]:
        buffer, clock = rest.buffer, rest.clock
        changed = _Changed(rest.agent, rest.account, rest.health)
        made = int(clock.updates)
        env, start, online = jax.device_get(choose(key, np.int32(made), clock.cursor))
        capacity = buffer.rows.is_first.shape[-1]
        index = places(start, length, capacity, np).astype(np.int32)
        steps = jax.device_put(host.read(buffer, env[0], start[0], length))
        for i in range(due):
            memo = host.memos(buffer, env[i], start[i], length, every_row=newest)
            window = Window(memo, steps, env[i], index[i])
            params, changed, fresh, taken = update(
                params, key, changed, rest.values, np.int32(made + i), window
            )
            if i + 1 < due:  # while the device computes
                steps = jax.device_put(host.read(buffer, env[i + 1], start[i + 1], length))
            fresh, taken = jax.device_get((fresh, taken))
            host.write_back(buffer, env[i], start[i], length, fresh, taken)
        cursor = clock.cursor._replace(online=online[due - 1])
        clock = clock._replace(updates=np.int32(made + due), cursor=cursor)
        return params, rest._replace(**changed._asdict(), clock=clock)

    return learn


STORES = {"device": on_device, "host": on_host}
