"""Acting with fixed parameters: returns of episodes, recordings, and dreams of recordings.

Agents act in the mode "sample" by default: they draw from their policy, without the noise that
only training adds. `evaluate` and `collect` take a single environment and compile as a whole;
`host_evaluator` and `host_collect` do the same with simulators on the host.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.config import require
from jaxwm.envs import wrappers
from jaxwm.envs.host import Pool
from jaxwm.models.imagine import dreamer
from jaxwm.train.act import Scene, advance, rows_after
from jaxwm.types import (
    Agent,
    Array,
    Env,
    Float,
    Key,
    Mode,
    Params,
    PyTree,
    Start,
    Step,
    WorldModel,
)

# Half an hour of an Atari game at 15 decisions per second.
LIMIT = 27_000


def _scenes(
    agent: Agent, params: Params, env: Env, key: Key, mode: Mode
) -> tuple[Scene, Callable[[Scene, Array], Scene]]:
    """The first scene of an agent in batched environments, and `scene, time -> scene` after it."""
    key_reset, key_run = jax.random.split(key)
    act = lambda carry, row, key: agent.act(params, carry, row, key, mode)  # noqa: E731

    def step(scene: Scene, time: Array) -> Scene:
        return advance(act, env, scene, jax.random.fold_in(key_run, time))[0]

    state, row = env.reset(key_reset)
    return Scene(state, row, agent.initial(row.is_first.shape[0])), step


def evaluate(
    agent: Agent,
    params: Params,
    env: Env,
    episodes: int,
    key: Key,
    limit: int = LIMIT,
    mode: Mode = "sample",
) -> Float[Array, " E"]:
    """Returns of fresh episodes, each in an environment of its own.

    Args:
      agent: the agent.
      params: its parameters.
      env: a single environment.
      episodes: number of episodes E, at least 1.
      key: determines episodes and actions.
      limit: steps after which the returns of unfinished episodes count as they are.
      mode: how the agent acts.

    Returns:
      Undiscounted sums of rewards (E,); all NaN if the environment gave a NaN or an infinity.

    Raises:
      JaxwmError: if `episodes` or `limit` is below 1.
    """
    _check_counts(episodes, limit)
    world = wrappers.guard(wrappers.batch(env, episodes))
    scene, act = _scenes(agent, params, world, key, mode)

    def going(state: tuple[Array, Scene, Array, Array]) -> Array:
        time, _, _, alive = state
        return (time < limit) & alive.any()

    def step(state: tuple[Array, Scene, Array, Array]) -> tuple[Array, Scene, Array, Array]:
        time, scene, total, alive = state
        scene = act(scene, time)
        total += jnp.where(alive, scene.row.reward, 0.0)
        return time + 1, scene, total, alive & ~scene.row.is_last

    state = (jnp.zeros((), jnp.int32), scene, jnp.zeros((episodes,)), ~scene.row.is_last)
    _, scene, total, _ = jax.lax.while_loop(going, step, state)
    return jnp.where(scene.env.fault.count > 0, jnp.nan, total)


def collect(
    agent: Agent,
    params: Params,
    env: Env,
    length: int,
    key: Key,
    count: int = 1,
    mode: Mode = "sample",
) -> Step:
    """Rows of `count` environments under the agent, episode after episode.

    Args:
      agent: the agent.
      params: its parameters.
      env: a single environment.
      length: rows T of each environment, at least 1; row 0 starts an episode.
      key: determines episodes and actions.
      count: number of environments B, at least 1.
      mode: how the agent acts.

    Returns:
      Rows (T, B).

    Raises:
      JaxwmError: if `length` or `count` is below 1.
    """
    require(length >= 1, f"A recording needs at least one row, not {length}.")
    first, act = _scenes(agent, params, wrappers.batch(env, count), key, mode)
    step = lambda scene, time: (act(scene, time), scene.row)  # noqa: E731
    return jax.lax.scan(step, first, jnp.arange(length))[1]


def host_evaluator(
    agent: Agent, pool: Pool, episodes: int, limit: int = LIMIT, mode: Mode = "sample"
) -> Callable[[Params, Key], np.ndarray]:
    """`params, key -> returns (E,)` of fresh episodes in simulators on the host.

    Every simulator plays the same number of episodes, so that short ones do not count more than
    long ones. An episode that a fault cut short is played again.

    Args:
      agent: the agent.
      pool: the simulators; the episodes that they are in are abandoned.
      episodes: number of episodes E, at least 1.
      limit: steps of each simulator, for each of its episodes, after which returns count as they
        are.
      mode: how the agent acts.

    Raises:
      JaxwmError: if `episodes` or `limit` is below 1; as `Pool.receive`, while it plays.
    """
    _check_counts(episodes, limit)
    rows = _host_rows(agent, pool, mode)
    share = -(-episodes // pool.count)

    def play(params: Params, key: Key) -> np.ndarray:
        done: list[list[float]] = [[] for _ in range(pool.count)]
        total = np.zeros(pool.count)
        for time, row in enumerate(rows(params, key)):
            total = np.where(row.is_first, 0.0, total) + row.reward
            for i in np.flatnonzero(row.is_last | (time >= limit * share)):
                done[i] += [float(total[i])] * (len(done[i]) < share)
            if all(len(returns) == share for returns in done):
                break
        return np.asarray(done, np.float32).T.reshape(-1)[:episodes]

    return play


def host_collect(
    agent: Agent, params: Params, pool: Pool, length: int, key: Key, mode: Mode = "sample"
) -> Step:
    """Rows (T, B) of the pool's simulators under the agent; see `collect`.

    Raises:
      JaxwmError: if `length` is below 1; as `Pool.receive`.
    """
    require(length >= 1, f"A recording needs at least one row, not {length}.")
    rows = _host_rows(agent, pool, mode)(params, key)
    return jax.tree.map(lambda *x: np.stack(x), *itertools.islice(rows, length))


def _host_rows(agent: Agent, pool: Pool, mode: Mode) -> Callable[[Params, Key], Iterator[Step]]:
    """`params, key -> rows` of the pool without end; the first ones start episodes."""
    act = jax.jit(lambda *given: agent.act(*given, mode))

    def rows(params: Params, key: Key) -> Iterator[Step]:
        def act_at(carry: PyTree, row: Step, time: int) -> Any:
            return act(params, carry, row, jax.random.fold_in(key, time))

        first, carry = pool.reset(), agent.initial(pool.count)
        yield first
        for row, _ in rows_after(act_at, pool.send, pool.receive, first, carry):
            yield row

    return rows


def _check_counts(episodes: int, limit: int) -> None:
    require(episodes >= 1, f"An evaluation needs at least one episode, not {episodes}.")
    require(limit >= 1, f"The limit of an evaluation is at least one step, not {limit}.")


def open_loop(
    model: WorldModel, params: Params, steps: Step, context: int, key: Key
) -> dict[str, Array]:
    """What a world model predicts for a recording when it sees only the beginning.

    The model filters the rows before `context` (posterior). From there on it dreams with the
    recorded actions (prior).

    Args:
      model: the world model.
      params: its parameters.
      steps: recorded rows (T, B), which start like an episode.
      context: number of rows that the model sees, in 1..T.
      key: determines the latents drawn.

    Returns:
      The mode of every observation key that the model predicts, (T, B, ...), in the recorded types
      and shapes.

    Raises:
      JaxwmError: if `context` is out of range.
    """
    length, count = steps.is_first.shape
    require(1 <= context <= length, f"The context is {context} rows; it must be 1 to {length}.")
    key_seen, key_dream = jax.random.split(key)
    seen = jax.tree.map(lambda x: x[:context], steps)
    draws = model.draws(key_seen, (context, count))
    observed = model.observe(params, model.initial(count), seen, draws)
    latents = observed.latents
    if context < length:
        last = jax.tree.map(lambda x: x[-1], latents)
        # The action of row t led to it: it takes the dream from row t - 1 to row t.
        actions = jax.tree.map(lambda x: x[context:], steps.action)
        dreams = dreamer(model, params).imagine(
            Start(observed.carry, last, jnp.arange(count)),
            lambda features, action: action,
            (model.draws(key_dream, (length - context, count)), actions),
        )
        latents = jax.tree.map(
            lambda seen, dreamed, last: jnp.concatenate([seen, dreamed[1:], last[None]]),
            latents,
            dreams.latents,
            dreams.last,
        )
    outputs = model.predict(params, latents, tuple(steps.obs))
    return {name: x.mode().astype(steps.obs[name].dtype) for name, x in outputs.items()}
