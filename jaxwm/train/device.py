"""The driver that keeps everything on the device: a chunk of iterations is one compiled program.

One iteration: the agent acts on the present rows, the rows go to the replay, the environments step,
and as many updates follow as are due.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxwm import backend
from jaxwm.envs import wrappers
from jaxwm.recipes import RunConfig
from jaxwm.replay.config import Rhythm
from jaxwm.replay.device import Replay
from jaxwm.train import mesh, processes
from jaxwm.train.act import Scene, advance, explorer
from jaxwm.train.learn import learn, zero_metrics
from jaxwm.train.mesh import P
from jaxwm.train.program import NUMBER, TRUTH, Chunk, Program, Setup, temporary_bytes
from jaxwm.train.state import (
    AXES,
    SUMS,
    AgentOf,
    TrainState,
    begin_line,
    beginning,
    count_episodes,
    members_of,
    metrics_of,
)
from jaxwm.types import ALONE, Array, Env, Key, Metrics, Shards, Step, zeros

# The axes that each part of a state leads with: experience differs from shard to shard.
_OWN = ("env", "row", "carry", "buffer", "episodes")
LEADS: Any = TrainState._make(
    P() if name == "clock" else P(mesh.SHARDS, mesh.MEMBERS) if name in _OWN else P(mesh.MEMBERS)
    for name in TrainState._fields
)


def on_device(setup: Setup, single: Env) -> Program:
    """The program of a run whose environments are on the device; `single` is one of them."""
    config, layout, memory = mesh.shard_config(setup.config), setup.layout, setup.memory
    env = wrappers.guard(wrappers.batch(single, config.envs))
    agent_of = setup.agents(ALONE)
    whole = None
    if layout.shard_params:
        whole = jax.eval_shape(agent_of({}).init, jax.random.key(0))
    leads = LEADS if whole is None else LEADS._replace(agent=mesh.learned(layout, whole))
    shards = mesh.shards_of(layout, whole)
    learner_of = setup.agents(shards) if layout.shards > 1 else agent_of
    zero = functools.partial(zero_metrics, memory)
    init = beginning(config, learner_of, memory, zero, _first_rows(env, shards))
    chunk = _chunk(config, env, learner_of, memory, setup.rhythm, shards)
    if config.members > 1:
        init = jax.vmap(init, out_axes=AXES)
        chunk = jax.vmap(chunk, in_axes=(AXES, None, None), out_axes=(AXES, 0))
    each = P(mesh.MEMBERS)
    init = jax.jit(mesh.spread(init, layout, (each, each), leads))
    go = mesh.spread(chunk, layout, (leads, P(), P()), (leads, each))
    go = backend.jit(go, donate_argnums=0)

    def shapes() -> TrainState:
        return mesh.placed(jax.eval_shape(init, *members_of(config)), layout, leads)

    def compiled() -> Chunk:
        program = go.lower(shapes(), NUMBER, TRUTH).compile()
        return Chunk(program, setup.iterations, temporary_bytes(program))

    return Program(
        env=env,
        agent=agent_of({}),
        agent_of=agent_of,
        replay=memory,
        rhythm=setup.rhythm,
        shapes=shapes,
        init=lambda: init(*mesh.put(members_of(config), layout, each)),
        resume=lambda state: state,
        chunk=Chunk(go, setup.iterations),
        compile=compiled,
        fault=functools.partial(_fault, env, config, layout.shards),
        close=lambda: None,
        iterations=setup.iterations,
        layout=layout,
    )


def _first_rows(env: Env, shards: Shards) -> Callable[[Key], tuple[Any, Step]]:
    """`key -> state of the environments, first rows`, of one shard."""

    def reset(key: Key) -> tuple[Any, Step]:
        state, row = env.reset(shards.own(key))
        return state, row._replace(action=zeros(env.action_space, row.is_first.shape))

    return reset


def _chunk(
    config: RunConfig,
    env: Env,
    learner_of: AgentOf,
    memory: Replay,
    rhythm: Rhythm,
    shards: Shards,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]:
    """`state, count, fresh -> state, metrics`: some iterations of one member and shard."""

    def chunk(state: TrainState, count: Array, fresh: Array) -> tuple[TrainState, Metrics]:
        agent = learner_of(state.values)
        act = explorer(agent, env.action_space, rhythm.random)

        def iterate(_: Array, state: TrainState) -> TrainState:
            state = collect(state, act, env, memory)
            clock = state.clock
            due, credit = rhythm.due(clock.cursor.written, clock.credit)
            state = state._replace(clock=clock._replace(credit=credit))
            return learn(state, due, agent, memory, config.on_divergence)

        own = begin_line(state._replace(key=shards.own(state.key)), fresh)
        # The count is no part of the program: chunks of any length share it.
        after = jax.lax.fori_loop(0, count, iterate, own)
        ended = shards.total({name: getattr(after.episodes, name) for name in SUMS})
        metrics = metrics_of(after.account, after.health, after.episodes._replace(**ended))
        return after._replace(key=state.key), metrics

    return chunk


def collect(state: TrainState, act: Callable[..., Any], env: Env, memory: Replay) -> TrainState:
    """Acts on the present rows, stores them with their memos, steps the environments.

    Args:
      state: the experiment.
      act: as from `act.explorer`.
      env: batched environments.
      memory: the replay.
    """
    clock = state.clock
    key = jax.random.fold_in(state.key, 2 * clock.iteration)  # odd folds are for learning
    policy = lambda carry, row, key: act(  # noqa: E731
        state.agent.params, carry, row, key, clock.iteration
    )
    scene, memo = advance(policy, env, Scene(state.env, state.row, state.carry), key)
    buffer, cursor = memory.add(state.buffer, clock.cursor, state.row, memo)
    return state._replace(
        **scene._asdict(),
        buffer=buffer,
        episodes=count_episodes(state.episodes, scene.row),
        clock=clock._replace(iteration=clock.iteration + 1, cursor=cursor),
    )


def _fault(env: Env, config: RunConfig, shards: int, state: TrainState) -> str | None:
    """What `wrappers.guard` met in the first member that has met anything."""
    fault = processes.fetch(state.env.fault)
    if shards > 1:
        fault = wrappers.first_fault(fault, config.envs)
    fault = jax.tree.map(lambda x: np.atleast_1d(np.asarray(x)), fault)
    for index in range(config.members):
        message = wrappers.fault_message(env, jax.tree.map(lambda x, i=index: x[i], fault))
        if message:
            which = f"(member {index} of {config.members}) " if config.members > 1 else ""
            return which + message
    return None
