"""Wrappers: pure functions from an environment to an environment.

All but `guard` take a single environment (no batch axis), so they are applied from the inside
out and `batch` comes last but for `guard`:

    env = guard(batch(time_limit(action_repeat(normalize_action(env), 2), 500), count=16))

Batched environments follow the time table of `jaxwm.types`: the row with `is_last` is kept,
the action chosen at it is ignored, and the next row of that environment is the `is_first` row
of a new episode.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax
from jaxtyping import Array, Bool, Int, PyTree

from jaxwm.types import Box, Env, JaxwmError, Key, Space, Step, as_dict, nearest, zeros


class BatchState(NamedTuple):
    """States of B environments, and which of them ended at the previous row."""

    env: PyTree
    ended: Bool[Array, " B"]


class StickyState(NamedTuple):
    """A state and the action taken last."""

    env: PyTree
    action: PyTree


class LimitState(NamedTuple):
    """A state and the number of steps since its episode began."""

    env: PyTree
    elapsed: Int[Array, ""]


class Fault(NamedTuple):
    """How many bad rows `guard` has met, and where the first of them was (-1: nowhere)."""

    count: Int[Array, ""]
    key_index: Int[Array, ""]
    env_index: Int[Array, ""]


class GuardState(NamedTuple):
    """A batched state and the record of faults."""

    env: BatchState
    fault: Fault


def batch(env: Env, count: int, pool: int | None = None) -> Env:
    """`count` copies of an environment that start new episodes by themselves.

    Resets may cost far more than steps (a new world against a move in it), so they run under a
    `lax.cond` only when some environment needs one, `pool` at a time and as many rounds as it
    takes. Each environment resets with its own key, so `pool` changes the speed, never the
    result: it trades wasted resets when few episodes end at once against more rounds when many
    do. The `lax.cond` stays one under an outer `vmap` (over seeds, say).

    Args:
      env: a single environment.
      count: number of environments B, at least 1.
      pool: resets per round, 1..count; `ceil(count / 16)` by default.

    Returns:
      An environment with a leading axis B on states, actions and rows, and one key per call.
      Its rows carry the action they were given, zeros where `is_first`.

    Raises:
      JaxwmError: if `count` or `pool` is out of range.
    """
    if count < 1:
        raise JaxwmError(f"A batch needs at least one environment, but count is {count}.")
    pool = math.ceil(count / 16) if pool is None else pool
    if not 1 <= pool <= count:
        raise JaxwmError(f"pool must lie in 1..{count} (count), but it is {pool}.")

    def reset(key):
        state, row = _strong(jax.vmap(env.reset)(jax.random.split(key, count)))
        return BatchState(state, row.is_last), row

    def step(state, action, key):
        key_step, key_reset = jax.random.split(key)
        keys = jax.random.split(key_step, count)
        moved = _strong(jax.vmap(env.step)(state.env, action, keys))
        rounds = -(-_largest(state.ended.sum(dtype=jnp.int32)) // pool)
        inner, row = lax.cond(
            rounds > 0,
            lambda moved: _select(
                state.ended, _fresh(env, state.ended, moved, key_reset, rounds, pool), moved
            ),
            lambda moved: moved,
            moved,
        )
        return BatchState(inner, row.is_last), row

    return env._replace(reset=reset, step=step)


def _fresh(env: Env, ended: Array, like: PyTree, key: Key, rounds: Array, pool: int) -> PyTree:
    """New episodes for at least the environments that `ended`, `pool` of them per round."""
    count = len(ended)
    # Raw key data: a typed key closed over by a loop looks like reuse to the key checker.
    raw = jax.random.key_data(jax.random.split(key, count))
    impl = jax.random.key_impl(key)
    order = jnp.argsort(~ended, stable=True)
    # Wrapping round at the end writes some environments twice, with the same values.
    order = jnp.resize(order, (math.ceil(count / pool) * pool,))

    def one_round(i, fresh):
        index = lax.dynamic_slice(order, (i * pool,), (pool,))
        made = jax.vmap(env.reset)(jax.random.wrap_key_data(raw[index], impl=impl))
        return jax.tree.map(lambda all_, new: all_.at[index].set(new), fresh, made)

    # No gradient enters the loop, so the batched step can still be differentiated.
    return lax.fori_loop(0, rounds, one_round, lax.stop_gradient(like))


@custom_batching.custom_vmap
def _largest(number):
    """The largest over all axes mapped from outside, itself not mapped.

    A mapped predicate would turn the `lax.cond` of `batch` into a select of both branches.
    """
    return number


@_largest.def_vmap
def _largest_vmap(axis_size, in_batched, number):
    del axis_size, in_batched
    return _largest(number.max(axis=0)), False


def _select(flag: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `flag`, else `old`; `flag` has the leading axes of every leaf."""

    def leaf(x, y):
        return jnp.where(flag.reshape(flag.shape + (1,) * (jnp.ndim(y) - flag.ndim)), x, y)

    return jax.tree.map(leaf, new, old)


def _strong(tree: PyTree) -> PyTree:
    """The same values without weak types, which would cause a second trace of the caller."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return lax.convert_element_type(x, x.dtype)

    return jax.tree.map(leaf, tree)


def time_limit(env: Env, limit: int) -> Env:
    """Cuts episodes after `limit` steps: `is_last` without `is_terminal`.

    An episode that ends by itself at that very step stays terminal.

    Args:
      env: a single environment.
      limit: most steps of an episode, at least 1.

    Returns:
      The environment with the limit.

    Raises:
      JaxwmError: if `limit` is below 1.
    """
    if limit < 1:
        raise JaxwmError(f"A time limit must be at least one step, but it is {limit}.")

    def reset(key):
        state, row = env.reset(key)
        return LimitState(state, jnp.zeros((), jnp.int32)), row

    def step(state, action, key):
        inner, row = env.step(state.env, action, key)
        elapsed = state.elapsed + 1
        return LimitState(inner, elapsed), row._replace(is_last=row.is_last | (elapsed >= limit))

    return env._replace(reset=reset, step=step)


def action_repeat(env: Env, times: int) -> Env:
    """Takes each action `times` times and sums the rewards.

    It stops at the end of the episode: neither state nor row moves on from there.

    Args:
      env: a single environment.
      times: number of repeats, at least 1.

    Returns:
      The environment whose one step is up to `times` steps.

    Raises:
      JaxwmError: if `times` is below 1.
    """
    if times < 1:
        raise JaxwmError(f"An action must be taken at least once, but times is {times}.")
    if times == 1:
        return env

    def step(state, action, key):
        keys = jax.random.split(key, times)
        carry = env.step(state, action, keys[0])

        def again(carry, key):
            state, row = carry
            state_next, row_next = env.step(state, action, key)
            row_next = row_next._replace(reward=row.reward + row_next.reward)
            return _select(row.is_last, carry, (state_next, row_next)), None

        return lax.scan(again, carry, keys[1:])[0]

    return env._replace(step=step)


def sticky_actions(env: Env, probability: float = 0.25) -> Env:
    """With some probability takes the action of the step before instead of the one chosen.

    It starts from the zero action. Rows carry the agent's choice: what was done instead is a
    part of the world. Inside `action_repeat` the coin is thrown for every frame, outside once
    for all of them.

    Args:
      env: a single environment.
      probability: of repeating, in 0..1.

    Returns:
      The environment, no longer deterministic.

    Raises:
      JaxwmError: if `probability` is out of range.

    Source: "Revisiting the Arcade Learning Environment" (arXiv:1709.06009), section 5.
    """
    if not 0 <= probability <= 1:
        raise JaxwmError(f"A probability lies in 0 to 1, but sticky actions got {probability}.")

    def reset(key):
        state, row = env.reset(key)
        return StickyState(state, zeros(env.action_space)), row

    def step(state, action, key):
        key_coin, key_step = jax.random.split(key)
        stuck = jax.random.bernoulli(key_coin, probability)
        taken = jax.tree.map(lambda old, new: jnp.where(stuck, old, new), state.action, action)
        inner, row = env.step(state.env, taken, key_step)
        return StickyState(inner, taken), row._replace(action=action)

    return env._replace(reset=reset, step=step)


def scale_reward(env: Env, factor: float) -> Env:
    """Multiplies every reward by `factor`; no preset uses it.

    Raises:
      JaxwmError: if `factor` is zero or not finite.
    """
    if factor == 0 or not math.isfinite(factor):
        raise JaxwmError(f"Rewards can be scaled by a finite number but 0, not by {factor}.")
    return _map_rows(env, lambda row: row._replace(reward=row.reward * factor))


def map_observation(
    env: Env, name: str, space: Space, function: Callable[[Array], Array], rename: str | None = None
) -> Env:
    """Replaces one entry of the observations by a function of it.

    Args:
      env: a single environment.
      name: the entry.
      space: the space of what `function` returns.
      function: from one element to another, in jax.
      rename: the new name of the entry, if not `name`.

    Returns:
      The environment with the new entry in place of the old one.

    Raises:
      JaxwmError: if there is no such entry.
    """
    if name not in env.obs_space:
        raise nearest(name, env.obs_space, f"observation of {env.name}")

    def replace(entries, value):
        rest = {key: entry for key, entry in entries.items() if key != name}
        return rest | {rename or name: value}

    def see(row):
        return row._replace(obs=replace(row.obs, function(row.obs[name])))

    return _map_rows(env, see)._replace(obs_space=replace(env.obs_space, space))


def _map_rows(env: Env, function: Callable[[Step], Step]) -> Env:
    def reset(key):
        state, row = env.reset(key)
        return state, function(row)

    def step(state, action, key):
        state, row = env.step(state, action, key)
        return state, function(row)

    return env._replace(reset=reset, step=step)


def normalize_action(env: Env) -> Env:
    """Exposes every bounded `Box` action as float32 in [-1, 1].

    The agent's action is clipped to [-1, 1] and mapped linearly to the bounds, if they are others;
    rows carry the agent's action as it was given. `Discrete` actions pass unchanged.

    Args:
      env: a single environment.

    Returns:
      The environment with the new action space.

    Raises:
      JaxwmError: if a `Box` action has an infinite bound.
    """
    inner = env.action_space
    for name, space in as_dict(inner).items():
        if isinstance(space, Box) and not np.isfinite([*bounds(space)]).all():
            raise JaxwmError(
                f"Action {name!r} of {env.name} has an infinite bound (low {space.low}, high "
                f"{space.high}), so it cannot be scaled to [-1, 1]. Give its Box finite bounds, "
                "or squash the action inside the environment."
            )

    outer = map_spaces(
        lambda space: Box(space.shape, "float32", -1.0, 1.0) if isinstance(space, Box) else space,
        inner,
    )

    def rescale(space, value):
        if not isinstance(space, Box):
            return value
        low, high = bounds(space)
        value = jnp.clip(value, -1.0, 1.0)
        if (low == -1.0).all() and (high == 1.0).all():
            return value.astype(space.dtype)
        return (low + (value + 1.0) / 2.0 * (high - low)).astype(space.dtype)

    def reset(key):
        state, row = env.reset(key)
        return state, row._replace(action=zeros(outer))

    def step(state, action, key):
        state, row = env.step(state, map_spaces(rescale, inner, action), key)
        return state, row._replace(action=action)

    return env._replace(action_space=outer, reset=reset, step=step)


def bounds(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of a box, float32 arrays of its shape."""

    def fill(bound):
        flat = np.asarray(bound, np.float32)
        return np.broadcast_to(flat, space.shape) if flat.ndim == 0 else flat.reshape(space.shape)

    return fill(space.low), fill(space.high)


def map_spaces(function: Any, space: Any, *values: Any) -> Any:
    """`function` of a space and its values, or of each part of a dict of them."""
    if isinstance(space, dict):
        return {name: function(part, *(v[name] for v in values)) for name, part in space.items()}
    return function(space, *values)


def guard(env: Env) -> Env:
    """Keeps NaN and infinity out of the rows of a batched environment, and remembers them.

    A row with a bad number in a float observation or the reward gets zeros in place of the bad
    numbers and ends its episode by a cut (`is_last`, never `is_terminal`: a broken row says
    nothing about the future), so that the environment starts afresh; a bad first row makes an
    episode of one row. In a box with `missing`, -inf is a value. The state carries the `Fault`;
    `fault_message` puts it into words.

    Args:
      env: an environment made by `batch`.

    Returns:
      The environment whose rows are finite and whose state is a `GuardState`.
    """
    keys = _guarded(env)

    def bad(name, value):
        wrong = ~jnp.isfinite(value)
        if name != "reward" and env.obs_space[name].missing:
            wrong &= ~jnp.isneginf(value)
        return wrong

    def watch(state, row, fault):
        values = {**row.obs, "reward": row.reward}
        floats = [k for k in keys if jnp.issubdtype(values[k].dtype, jnp.floating)]
        wrong = {k: bad(k, values[k]) for k in floats}
        clean = values | {
            k: jnp.where(w, jnp.zeros((), w.dtype), values[k]) for k, w in wrong.items()
        }
        count = len(row.reward)
        none = jnp.zeros(count, bool)
        table = jnp.stack(
            [wrong[k].reshape(count, -1).any(axis=1) if k in wrong else none for k in keys], axis=1
        )
        broken = table.any(axis=1)
        where = jnp.argmax(table.reshape(-1)).astype(jnp.int32)
        first = (fault.count == 0) & broken.any()
        fault = Fault(
            fault.count + broken.sum(dtype=jnp.int32),
            jnp.where(first, where % len(keys), fault.key_index),
            jnp.where(first, where // len(keys), fault.env_index),
        )
        reward = clean.pop("reward")
        row = row._replace(
            obs=clean,
            reward=reward,
            is_last=row.is_last | broken,
            is_terminal=row.is_terminal & ~broken,
        )
        return GuardState(state._replace(ended=row.is_last), fault), row

    def reset(key):
        state, row = env.reset(key)
        zero = jnp.zeros((), jnp.int32)
        return watch(state, row, Fault(zero, zero - 1, zero - 1))

    def step(state, action, key):
        inner, row = env.step(state.env, action, key)
        return watch(inner, row, state.fault)

    return env._replace(reset=reset, step=step)


def _guarded(env: Env) -> list[str]:
    """What `Fault.key_index` counts: the observation keys in order, then the reward."""
    return [*sorted(env.obs_space), "reward"]


def first_fault(fault: Any, count: int) -> Fault:
    """The record of all shards as one, in numpy.

    Args:
      fault: the records of all shards, which lead every array.
      count: environments of each shard.

    Returns:
      All bad rows, and where the first of the first shard was that has any.
    """
    shard = (fault.count > 0).argmax(0)
    key_index, env_index = (np.take_along_axis(x, shard[None], 0)[0] for x in fault[1:])
    return Fault(fault.count.sum(0), key_index, env_index + shard * count)


def fault_message(env: Env, fault: Fault) -> str | None:
    """What `guard` met, in words; call it on the host.

    Args:
      env: the guarded environment.
      fault: its record, as numbers; with a leading axis of seeds, take one seed.

    Returns:
      One paragraph, or None if all rows were finite.
    """
    if int(fault.count) == 0:
        return None
    key = _guarded(env)[int(fault.key_index)]
    what = "reward" if key == "reward" else f"observation {key!r}"
    return (
        f"{env.name} gave a NaN or an infinity: first in the {what} of environment "
        f"{int(fault.env_index)}, {int(fault.count)} bad rows so far. Bad numbers were replaced "
        "by zeros and the episodes cut. Look for a division by zero or a diverging simulation: "
        "try smaller actions or time steps, or clip the value in the environment."
    )
