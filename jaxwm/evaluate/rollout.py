"""Acting with fixed parameters: returns of episodes, recorded sequences, dreams of them.

Actions are drawn from the policy, as in training. Functions of a single environment compile as a
whole; `host_evaluator` and `host_collect` do the same with simulators on the host.
"""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.agent import Agent
from jaxwm.config import require
from jaxwm.envs import wrappers
from jaxwm.envs.host import Pool
from jaxwm.types import Action, Array, Env, Float, Key, Latent, Params, Step, as_dict

# Half an hour of an Atari game at 15 decisions per second.
LIMIT = 27_000


def evaluate(
    agent: Agent, params: Params, env: Env, episodes: int, key: Key, limit: int = LIMIT
) -> Float[Array, " E"]:
    """Returns of fresh episodes, one in each of as many environments.

    Args:
      agent: the agent.
      params: its parameters.
      env: a single environment.
      episodes: number of episodes E, at least 1.
      key: determines episodes and actions.
      limit: steps after which episodes that go on are counted as they are.

    Returns:
      Undiscounted sums of rewards (E,); all NaN if the environment gave a NaN or an infinity.

    Raises:
      JaxwmError: if `episodes` or `limit` is below 1.
    """
    require(episodes >= 1, f"An evaluation needs at least one episode, not {episodes}.")
    require(limit >= 1, f"The limit of an evaluation is at least one step, not {limit}.")
    world = wrappers.guard(wrappers.batch(env, episodes))
    key_reset, key_run = jax.random.split(key)
    state, row = world.reset(key_reset)

    def going(carry):
        time, *_, alive = carry
        return (time < limit) & alive.any()

    def step(carry):
        time, state, row, latent, total, alive = carry
        key_act, key_env = jax.random.split(jax.random.fold_in(key_run, time))
        latent, action = agent.act(params, latent, row, key_act)
        state, row = world.step(state, action, key_env)
        total += jnp.where(alive, row.reward, 0.0)
        return time + 1, state, row, latent, total, alive & ~row.is_last

    latent, total = agent.initial(episodes), jnp.zeros((episodes,))
    carry = (jnp.zeros((), jnp.int32), state, row, latent, total, ~row.is_last)
    _, state, _, _, total, _ = jax.lax.while_loop(going, step, carry)
    return jnp.where(state.fault.count > 0, jnp.nan, total)


def collect(agent: Agent, params: Params, env: Env, length: int, key: Key, count: int = 1) -> Step:
    """Rows of `count` environments under the agent, episode after episode.

    Args:
      agent: the agent.
      params: its parameters.
      env: a single environment.
      length: rows T of each environment, at least 1; row 0 starts an episode.
      key: determines episodes and actions.
      count: number of environments B, at least 1.

    Returns:
      Rows (T, B).

    Raises:
      JaxwmError: if `length` or `count` is below 1.
    """
    require(length >= 1, f"A recording needs at least one row, not {length}.")
    world = wrappers.batch(env, count)
    key_reset, key_run = jax.random.split(key)
    state, row = world.reset(key_reset)

    def step(carry, time):
        state, row, latent = carry
        key_act, key_env = jax.random.split(jax.random.fold_in(key_run, time))
        latent, action = agent.act(params, latent, row, key_act)
        state, row_next = world.step(state, action, key_env)
        return (state, row_next, latent), row

    return jax.lax.scan(step, (state, row, agent.initial(count)), jnp.arange(length))[1]


def host_evaluator(
    agent: Agent, pool: Pool, episodes: int, limit: int = LIMIT
) -> Callable[[Params, Key], np.ndarray]:
    """`params, key -> returns (E,)` of fresh episodes in simulators on the host.

    Every simulator plays its share of the episodes, so that short ones count no more than long
    ones. An episode that a fault cut short is played again.

    Args:
      agent: the agent.
      pool: the simulators; the episodes they are in when it begins are left.
      episodes: number of episodes E, at least 1.
      limit: steps of each simulator's share, after which returns are counted as they are.

    Raises:
      JaxwmError: if `episodes` or `limit` is below 1; as `Pool.receive`, while it plays.
    """
    require(episodes >= 1, f"An evaluation needs at least one episode, not {episodes}.")
    require(limit >= 1, f"The limit of an evaluation is at least one step, not {limit}.")
    act = jax.jit(agent.act)
    share = -(-episodes // pool.count)

    def play(params: Params, key: Key) -> np.ndarray:
        done: list[list[float]] = [[] for _ in range(pool.count)]
        total = np.zeros(pool.count)
        for time, row in enumerate(_rows(act, agent, params, pool, key)):
            total = np.where(row.is_first, 0.0, total) + row.reward
            for i in np.flatnonzero(row.is_last | (time >= limit * share)):
                done[i] += [float(total[i])] * (len(done[i]) < share)
            if all(len(returns) == share for returns in done):
                break
        return np.asarray(done, np.float32).T.reshape(-1)[:episodes]

    return play


def host_collect(agent: Agent, params: Params, pool: Pool, length: int, key: Key) -> Step:
    """Rows (T, B) of the pool's simulators under the agent; see `collect`.

    Raises:
      JaxwmError: if `length` is below 1; as `Pool.receive`.
    """
    require(length >= 1, f"A recording needs at least one row, not {length}.")
    rows = _rows(jax.jit(agent.act), agent, params, pool, key)
    return jax.tree.map(lambda *x: np.stack(x), *(next(rows) for _ in range(length)))


def _rows(
    act: Callable[..., tuple[Latent, Action]],
    agent: Agent,
    params: Params,
    pool: Pool,
    key: Key,
) -> Iterator[Step]:
    """The rows of the pool, beginning with those that begin episodes, for ever."""
    row, latent = pool.reset(), agent.initial(pool.count)
    for time in itertools.count():
        yield row
        latent, action = act(params, latent, row, jax.random.fold_in(key, time))
        row = pool.step(jax.device_get(action))


def open_loop(
    agent: Agent, params: Params, steps: Step, context: int, key: Key
) -> dict[str, Array]:
    """What the world model shows for a recorded sequence of which it sees only the beginning.

    Rows before `context` are filtered (posterior); from there on the model dreams with the
    actions that were taken (prior).

    Args:
      agent: the agent.
      params: its parameters.
      steps: recorded rows (T, B); what came before row 0 is forgotten.
      context: number of rows the model is given, in 1..T.
      key: determines the latents drawn.

    Returns:
      The mode of every observation key, (T, B, ...), of the recorded types and shapes.

    Raises:
      JaxwmError: if `context` is out of range.
    """
    length, count = steps.is_first.shape
    require(1 <= context <= length, f"The context is {context} rows; it must be 1 to {length}.")
    model, weights = agent.model, params["model"]
    key_seen, key_dream = jax.random.split(key)
    seen = jax.tree.map(lambda x: x[:context], steps)
    noise = model.noise(key_seen, (context, count))
    latents, _ = model.observe(weights, agent.initial(count), seen, noise)
    if context < length:
        # The action of row t led to it: it takes the dream from row t - 1 to row t.
        actions = {name: x[context:] for name, x in as_dict(steps.action).items()}
        noise = model.noise(key_dream, (length - context, count))
        start = jax.tree.map(lambda x: x[-1], latents)
        dream, _, _ = model.imagine(weights, start, lambda feat, x: (x, None), noise, actions)
        latents = jax.tree.map(lambda a, b: jnp.concatenate([a, b[1:]]), latents, dream)
    outputs = model.predict(weights, latents, tuple(steps.obs))
    return {name: outputs[name].mode().astype(x.dtype) for name, x in steps.obs.items()}
