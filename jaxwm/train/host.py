"""The driver for simulators on the host, which step in worker processes while the device learns.

If updates come as soon as they are earned, acting does not wait for learning: it uses the
parameters from before the newest round of updates. It does wait for updates made in blocks, when
learning begins, and for agents that learn from the newest rows. Which parameters act when depends
on counters alone, never on how fast anything was, and so does the train ratio.

The replay and the updates run in a thread of their own: jax runs the requests of one thread in
order, but those of several threads side by side where the device can.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.envs.host import Pool, TooManyFaults
from jaxwm.recipes import RunConfig
from jaxwm.replay.config import Rhythm
from jaxwm.train.act import explorer, rows_after
from jaxwm.train.learn import zero_metrics
from jaxwm.train.program import NUMBER, Chunk, Program, Setup, temporary_bytes
from jaxwm.train.state import (
    AXES,
    AgentOf,
    HostState,
    TrainState,
    begin_line,
    beginning,
    count_episodes,
    empty_row,
    members_of,
    metrics_of,
)
from jaxwm.train.stores import STORES, without_acting
from jaxwm.types import ALONE, Action, Array, HostEnv, Key, Params, PyTree, Step


def on_host(setup: Setup, env: HostEnv) -> Program:
    """The program of a run with simulators on the host."""
    config, memory = setup.config, setup.memory
    agent_of = setup.agents(ALONE)
    store = STORES[config.replay.place](config, agent_of, memory, setup.rhythm)
    act = jax.jit(_actor(config, env, agent_of, setup.rhythm))
    zero = functools.partial(zero_metrics, memory)
    no_simulators = lambda key: ((), empty_row(env, config.envs))  # noqa: E731
    start = beginning(config, agent_of, memory, zero, no_simulators)
    if config.members > 1:
        start = jax.vmap(start, out_axes=AXES)
    start = jax.jit(store.start(start))
    opened: list[Simulators] = []

    def close() -> None:
        while opened:
            opened.pop().pool.close()

    def resume(state: TrainState) -> TrainState:
        close()
        opened.append(Simulators(env, config, int(state.clock.iteration)))
        episodes = jax.tree.map(np.zeros_like, jax.device_get(state.episodes))
        acting = HostState(state.agent.params)
        return state._replace(env=acting, row=opened[0].reset(), episodes=episodes)

    def shapes() -> TrainState:
        like = store.shapes(jax.eval_shape(start, *members_of(config)))
        return like._replace(env=HostState(like.agent.params))

    def chunk_of(act: Any, *others: Any) -> Any:
        learner = functools.partial(Learner, setup, *store.join(*others))
        return _chunk(opened, config, act, learner)

    def compiled() -> Chunk:
        like, (_, values) = shapes(), members_of(config)
        acts = (like.agent.params, like.carry, like.row, like.key, NUMBER, values)
        pairs = zip((act, *store.jits), (acts, *store.arguments(like)), strict=True)
        programs = [function.lower(*arguments).compile() for function, arguments in pairs]
        temporary = max(map(temporary_bytes, programs))
        return Chunk(chunk_of(*programs), setup.iterations, temporary)

    return Program(
        env=env,
        agent=agent_of({}),
        agent_of=agent_of,
        replay=memory,
        rhythm=setup.rhythm,
        shapes=shapes,
        init=lambda: resume(store.init(start(*members_of(config)))),
        resume=resume,
        chunk=Chunk(chunk_of(act, *store.jits), setup.iterations),
        compile=compiled,
        fault=lambda state: opened[0].pool.failure if opened else None,
        close=close,
        iterations=setup.iterations,
        layout=setup.layout,
    )


def _actor(
    config: RunConfig, env: HostEnv, agent_of: AgentOf, rhythm: Rhythm
) -> Callable[..., tuple[PyTree, Action, PyTree]]:
    """`params, carry, row, key, iteration, values -> carry, action, memo`, of all members."""

    def act(
        params: Params,
        carry: PyTree,
        row: Step,
        key: Key,
        iteration: Array,
        values: dict[str, Array],
    ) -> tuple[PyTree, Action, PyTree]:
        key_act, _ = jax.random.split(jax.random.fold_in(key, 2 * iteration))
        acts = explorer(agent_of(values), env.action_space, rhythm.random)
        return acts(params, carry, row, key_act, iteration)

    return jax.vmap(act, in_axes=(0, 0, 0, 0, None, 0)) if config.members > 1 else act


def _chunk(
    opened: "list[Simulators]",
    config: RunConfig,
    act: Callable[..., Any],
    learner_of: Callable[..., "Learner"],
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]:
    """`state, count, fresh -> state, metrics`: some iterations."""
    _, values = members_of(config)

    def chunk(state: TrainState, count: Any, fresh: Any) -> tuple[TrainState, dict[str, Any]]:
        simulators, begun = opened[0], time.perf_counter()
        simulators.waited = 0.0
        state = begin_line(state, fresh, np)
        now, episodes = (state.row, state.carry), jax.device_get(state.episodes)
        first = int(state.clock.iteration)
        with learner_of(state) as learner:

            def act_now(carry: PyTree, row: Step, number: int) -> Any:
                iteration = np.int32(first + number)
                return act(learner.acting, carry, row, state.key, iteration, values)

            rows = rows_after(act_now, simulators.send, simulators.receive, *now, learner.take)
            with contextlib.suppress(TooManyFaults):  # `Program.fault` reports them
                for now in itertools.islice(rows, int(count)):
                    episodes = count_episodes(episodes, now[0], np)
        state = learner.state(state)
        account, health, ended = jax.device_get((state.account, state.health, episodes))
        metrics = metrics_of(account, health, ended, np)
        metrics |= simulators.metrics(time.perf_counter() - begun)
        episodes = jax.tree.map(np.float32, episodes)
        return state._replace(row=now[0], carry=now[1], episodes=episodes), metrics

    return chunk


class Simulators:
    """The pool of all members' simulators.

    Args:
      env: what to simulate.
      config: the run.
      iteration: iterations made before; together with the seed it determines the first episodes.
    """

    def __init__(self, env: HostEnv, config: RunConfig, iteration: int):
        seed = np.random.SeedSequence((config.seed, iteration)).generate_state(1)
        self._lead = (config.members, config.envs)
        self.pool = Pool(env, config.members * config.envs, config.host, int(seed[0]))
        self.waited = 0.0  # seconds in `receive`

    def reset(self) -> Step:
        """The rows that begin an episode in every simulator."""
        return self._split(self.pool.reset())

    def send(self, action: Any) -> None:
        """Lets every simulator take its action."""
        if self._lead[0] > 1:
            action = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), action)
        self.pool.send(action)

    def receive(self) -> Step:
        """The rows that the actions led to.

        Raises:
          TooManyFaults: as `Pool.receive`.
        """
        begun = time.perf_counter()
        row = self.pool.receive()
        self.waited += time.perf_counter() - begun
        return self._split(row)

    def metrics(self, seconds: float) -> dict[str, Any]:
        """Share of the last `seconds` spent waiting, faults so far, memory."""
        return {
            "host/waiting": self.waited / seconds,
            "host/faults": sum(self.pool.faults.values()),
            "memory/simulators": self.pool.resident_bytes(),
        }

    def _split(self, row: Step) -> Step:
        """Rows with an axis of members if there are several."""
        if self._lead[0] == 1:
            return row
        return jax.tree.map(lambda x: x.reshape(*self._lead, *x.shape[1:]), row)


class Learner:
    """Stores rows and makes updates in a thread of its own; use it in a `with` statement.

    Args:
      setup: the run.
      add: stores rows, see `stores.Store.join`.
      learn: makes updates, see there.
      state: where the run stands; leaving the `with` statement uses it up.

    Attributes:
      acting: the parameters that act now.
    """

    def __init__(self, setup: Setup, add: Any, learn: Any, state: TrainState):
        self.acting = state.env.acting
        self._add, self._learn, self._rhythm = add, learn, setup.rhythm
        self._lags = setup.rhythm.every == 1 and setup.memory.data == "windows"
        self._iteration, self._credit = int(state.clock.iteration), int(state.clock.credit)
        self._key, self._params, self._rest = state.key, state.agent.params, without_acting(state)
        self._thread = ThreadPoolExecutor(1, "learner")
        self._jobs: list[Future] = []
        self._newest: Future | None = None  # round of updates

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()
        if error[0] is None:
            for job in self._jobs:
                job.result()  # raises what went wrong in the thread

    def take(self, row: Step, memo: PyTree) -> None:
        """Stores rows, then makes the updates that are due; both happen in the thread."""
        self._jobs.append(self._thread.submit(self._keep, row, memo))
        self._iteration += 1
        due, self._credit = self._rhythm.due(self._iteration, self._credit)
        if not due:
            return
        self.acting = self._newest.result() if self._newest else self._params
        self._newest = self._thread.submit(self._improve, due)
        self._jobs.append(self._newest)
        begins = self._rhythm.pretrain and self._iteration == self._rhythm.begins
        if begins or not self._lags:
            self.acting = self._newest.result()

    def state(self, before: TrainState) -> TrainState:
        """The state after all that was taken; rows, carry and episodes are those before."""
        clock = self._rest.clock._replace(iteration=self._iteration, credit=self._credit)
        return self._rest._replace(
            key=before.key,
            agent=self._rest.agent._replace(params=self._params),
            env=HostState(self.acting),
            row=before.row,
            carry=before.carry,
            episodes=before.episodes,
            clock=jax.tree.map(jnp.int32, clock),
        )

    def _keep(self, row: Step, memo: PyTree) -> None:
        buffer, cursor = self._add(self._rest.buffer, self._rest.clock.cursor, row, memo)
        clock = self._rest.clock._replace(cursor=cursor)
        self._rest = self._rest._replace(buffer=buffer, clock=clock)

    def _improve(self, due: int) -> Params:
        self._params, self._rest = self._learn(self._params, self._key, self._rest, np.int32(due))
        return jax.block_until_ready(self._params)
