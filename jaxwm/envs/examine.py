"""What an environment does when it is run: faults in words, notes, speed and size.

`check.validate` looks at shapes before anything runs; `examine` plays random actions in many
environments at once and looks at the numbers.
"""

import contextlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.envs import check, wrappers
from jaxwm.envs.host import HostConfig, Pool, TooManyFaults
from jaxwm.types import Box, Discrete, Env, HostEnv, Key, Space, Step, as_dict

# A simulator that takes longer for one step is of no use for learning.
_TIMEOUT = 20.0
# After so many faults the verdict is clear.
_ENOUGH = 20


class Examination(NamedTuple):
    """What came out of it.

    Attributes:
      faults: what breaks the contract of `types.Env` or would spoil training, one sentence each.
      notes: what is allowed, but seldom meant.
      episodes: number of ended episodes.
      mean_return: mean return of those under random actions, NaN if there were none.
      mean_length: their mean length in steps.
      steps_per_second: of all of them; on the device compiled, on the host through its workers.
      state_bytes: size of one environment's state; on the host its share of a worker's memory.
      row_bytes: size of one row of experience.
    """

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    episodes: int
    mean_return: float
    mean_length: float
    steps_per_second: float
    state_bytes: int
    row_bytes: int


def examine(env: Env | HostEnv, count: int = 16, steps: int = 500, seed: int = 0) -> Examination:
    """Plays `steps` random actions in `count` environments and reports what it sees.

    Args:
      env: a single environment, before `wrappers.batch`.
      count: environments played at once.
      steps: steps of each.
      seed: of the actions and of the environment's own randomness.

    Raises:
      JaxwmError: if it cannot be run at all; see `check.validate` and `host.Pool`.
    """
    check.validate(env)
    with jax.debug_key_reuse(False):
        if isinstance(env, HostEnv):
            return _examine_host(env, count, steps, seed)
        return _examine(env, count, steps, seed)


def _examine(env: Env, count: int, steps: int, seed: int) -> Examination:
    many = wrappers.batch(env, count)
    key_actions, key_reset, key_steps = jax.random.split(jax.random.key(seed), 3)
    actions = random_actions(env, key_actions, (steps, count))

    def play(key_reset: Key, key_steps: Key, actions: Any) -> Step:
        state, row = many.reset(key_reset)
        keys = jax.random.split(key_steps, steps)
        rows = jax.lax.scan(lambda s, x: many.step(s, *x), state, (actions, keys))[1]
        return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), row, rows)

    def compiled() -> Any:
        # A function of its own each time, so that Python code is run again.
        return jax.jit(lambda *args: play(*args)).lower(key_reset, key_steps, actions).compile()

    run = compiled()
    rows = jax.block_until_ready(run(key_reset, key_steps, actions))
    start = time.perf_counter()
    jax.block_until_ready(run(key_reset, key_steps, actions))
    seconds = time.perf_counter() - start
    again = compiled()(key_reset, key_steps, actions)
    others = run(key_reset, key_steps, random_actions(env, key_reset, (steps, count)))
    rows, again, others = jax.device_get((rows, again, others))

    faults = [*_resets(env, count, key_reset), *_flags(rows), *_numbers(env, rows)]
    if not _equal(rows, again):
        faults.append(
            "Compiled twice, it does something else with the same keys: it draws from Python's or "
            "numpy's random numbers, or reads the clock or a global. Use the key it is given."
        )
    state, row = jax.eval_shape(env.reset, key_reset)
    speed = steps * count / seconds
    return _result(faults, rows, others, speed, _bytes(state), _bytes(row))


def _examine_host(env: HostEnv, count: int, steps: int, seed: int) -> Examination:
    key, key_other = jax.random.split(jax.random.key(seed))
    recordings, faults, speed, memory = [], [], 0.0, 0
    for k in (key_other, key, key):
        script = jax.device_get(random_actions(env, k, (steps, count)))
        with Pool(env, count, HostConfig(timeout=_TIMEOUT, max_faults=_ENOUGH), seed) as pool:
            rows, start = [pool.reset()], time.perf_counter()
            with contextlib.suppress(TooManyFaults):
                for t in range(steps):
                    rows.append(pool.step(jax.tree.map(lambda x, t=t: x[t], script)))
            speed = (len(rows) - 1) * count / (time.perf_counter() - start)
            faults = [f"It {kind}: {fault.text.strip()}" for kind, fault in pool.examples.items()]
            memory = pool.resident_bytes() // count
        recordings.append(jax.tree.map(lambda *x: np.stack(x), *rows))
        if faults:
            break  # a new process for each recording takes seconds; the verdict is clear
    others, again, rows = (recordings * 3)[:3]
    faults += _numbers(env, rows)
    if not faults and not _equal(rows, again):
        faults.append(
            "Seeded the same, it does something else after the same actions: it draws from "
            "Python's or numpy's global random numbers, or reads the clock. Pass the seed of "
            "reset on (super().reset(seed=seed)) and draw from self.np_random."
        )
    one_row = jax.tree.map(lambda x: x[0, 0], rows)
    return _result(faults, rows, others, speed, memory, _bytes(one_row))


def _result(
    faults: list[str], rows: Step, others: Step, speed: float, state_bytes: int, row_bytes: int
) -> Examination:
    """The examination of rows (T, B) that the same environments gave, `others` by other actions."""
    notes = _seldom_meant(rows, others)
    ended = int(rows.is_last.sum())
    returns, lengths = _episodes(rows)
    if ended == 0:
        notes.append(
            f"No episode ended within {len(rows.is_last) - 1} steps: give it a time limit."
        )
    return Examination(
        tuple(faults),
        tuple(notes),
        ended,
        float(np.mean(returns)) if len(returns) else float("nan"),
        float(np.mean(lengths)) if len(lengths) else float("nan"),
        speed,
        state_bytes,
        row_bytes,
    )


def random_actions(env: Env | HostEnv, key: Key, lead: tuple[int, ...]) -> Any:
    """Uniform random actions with leading axes `lead`; boxes without bounds within 1."""

    def draw(space: Space, key: Key) -> jax.Array:
        shape = (*lead, *space.shape)
        if isinstance(space, Discrete):
            classes = jnp.broadcast_to(
                jnp.asarray(space.classes).reshape(space.shape if _several(space) else ()), shape
            )
            return jax.random.randint(key, shape, 0, classes)
        low, high = wrappers.bounds(space)
        low, high = np.where(np.isfinite(low), low, -1), np.where(np.isfinite(high), high, 1)
        low, high = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in (low, high))
        return low + jax.random.uniform(key, shape) * (high - low)

    spaces = as_dict(env.action_space)
    keys = dict(zip(spaces, jax.random.split(key, len(spaces)), strict=True))
    drawn = {name: draw(space, keys[name]) for name, space in spaces.items()}
    return drawn if isinstance(env.action_space, dict) else drawn["action"]


def _several(space: Discrete) -> bool:
    return isinstance(space.classes, tuple)


def _resets(env: Env, count: int, key: Key) -> list[str]:
    """What is wrong with the rows that start episodes."""
    row = jax.jit(jax.vmap(env.reset))(jax.random.split(key, count))[1]
    faults = []
    if not np.all(row.is_first):
        faults.append("reset gives a row without is_first. Make it with jaxwm.types.first.")
    if np.any(row.is_last | row.is_terminal):
        faults.append("reset gives a row with is_last or is_terminal: an episode of no step.")
    if np.any(row.reward != 0):
        faults.append("reset gives a reward other than 0, but no action has led to it.")
    if any(np.any(x != 0) for x in jax.tree.leaves(row.action)):
        faults.append("reset gives an action other than 0, but none has been taken.")
    return faults


def _flags(rows: Step) -> list[str]:
    """What is wrong with the flags of (T, B) rows of self-resetting environments."""
    faults = []
    begun = np.concatenate([np.ones_like(rows.is_last[:1]), rows.is_last[:-1]])
    if np.any(rows.is_first & ~begun):
        faults.append(
            "step gives a row with is_first. It must never reset by itself: the wrapper "
            "`batch` does that, and would lose the last row of each episode."
        )
    if np.any(rows.is_terminal & ~rows.is_last):
        faults.append("step gives is_terminal without is_last: what has no future has ended.")
    return faults


def _numbers(env: Env | HostEnv, rows: Step) -> list[str]:
    """Numbers that are not finite or not in their space."""
    faults = []
    for name, space in env.obs_space.items():
        value = np.asarray(rows.obs[name])
        if isinstance(space, Discrete):
            counts = np.asarray(space.classes).reshape(space.shape if _several(space) else ())
            if np.any(value >= counts) or np.any(value < -int(space.missing)):
                faults.append(
                    f"Observation {name!r} holds {value.min()} to {value.max()}, but its classes "
                    f"are 0 to {space.width - 1}."
                )
            continue
        faults += _box(f"Observation {name!r}", space, value)
    faults += _box("The reward", Box(), np.asarray(rows.reward))
    return faults


def _box(what: str, space: Box, value: np.ndarray) -> list[str]:
    fine = np.isfinite(value) | (np.isneginf(value) if space.missing else False)
    if not np.all(fine):
        where = np.argwhere(~fine)[0]
        return [
            f"{what} holds NaN or infinity, first in step {where[0]} of environment {where[1]}. "
            "Look for a division by zero, a root of a negative number, or a diverging simulation."
        ]
    low, high = wrappers.bounds(space)
    slack = 1e-5 * np.maximum(1, np.abs(value))
    outside = (value < low - slack) & ~np.isneginf(value) | (value > high + slack)
    if np.any(outside):
        return [
            f"{what} holds {value[outside].flat[0]:.6g}, but its space has the bounds {space.low} "
            f"and {space.high}. Correct the one or the other."
        ]
    return []


def _seldom_meant(rows: Step, others: Step) -> list[str]:
    """Notes on what learning can do nothing with."""
    notes = []
    starts = {name: np.asarray(value)[0] for name, value in rows.obs.items()}
    if all(np.all(value == value[:1]) for value in starts.values()):
        notes.append("Every episode begins with the same observation, whatever the key.")
    for name, value in rows.obs.items():
        value = np.asarray(value)
        if np.all(value == value[:1, :1]):
            notes.append(f"Observation {name!r} never changes.")
    seen = lambda r: (r.obs, r.reward, r.is_last)  # noqa: E731
    if rows is not others and _equal(seen(rows), seen(others)):
        notes.append("Other actions lead to the very same observations, rewards and ends.")
    size = np.abs(np.nan_to_num(np.asarray(rows.reward)))
    if size.max() == 0:
        notes.append("Random actions never earned a reward: nothing to learn from at first.")
    elif not 1e-4 <= size.max() <= 1e4:
        notes.append(
            f"Rewards are as large as {size.max():.3g}: units between 0.01 and 1000 are learned "
            "best (wrappers.scale_reward)."
        )
    lengths = _episodes(rows)[1]
    same = len(lengths) > 1 and min(lengths) == max(lengths) > 20
    if same and np.all(rows.is_terminal == rows.is_last):
        notes.append(
            f"Every episode ends for good after {lengths[0]} steps: if that is a time limit, it "
            "should be a cut (truncated), or what could have followed is learned to be worth 0."
        )
    if len(lengths) and max(lengths) == 1:
        notes.append("Every episode has a single step: nothing follows from an action.")
    return notes


def _episodes(rows: Step) -> tuple[list[float], list[int]]:
    """Returns and lengths of the episodes that ended in (T, B) rows."""
    returns, lengths = [], []
    reward = np.where(np.isfinite(rows.reward), rows.reward, np.nan)
    for b in range(rows.is_last.shape[1]):
        begin = 0
        for end in np.flatnonzero(rows.is_last[:, b]):
            returns.append(float(reward[begin : end + 1, b].sum()))
            lengths.append(int(end - begin))
            begin = end + 1
    return returns, lengths


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in pairs)


def _bytes(tree: Any) -> int:
    """Size of arrays in bytes; a random key counts as its words."""

    def size(x: Any) -> int:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return x.size * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def report(env: Env | HostEnv, result: Examination) -> str:
    """An examination as text for the terminal, faults first."""
    lines = [f"{env.name}"]
    lines += [f"  FAULT  {text}" for text in result.faults]
    lines += [f"  note   {text}" for text in result.notes]
    lines += [
        f"  observations  {_told(env.obs_space)}",
        f"  actions       {_told(as_dict(env.action_space))}",
        f"  episodes      {result.episodes} ended under random actions: mean return "
        f"{result.mean_return:.4g}, mean length {result.mean_length:.4g}",
        f"  speed         {result.steps_per_second:,.0f} steps/s",
        f"  memory        {result.state_bytes:,} bytes of state, {result.row_bytes:,} per row",
        "  broken" if result.faults else "  good",
    ]
    return "\n".join(lines)


def _told(spaces: dict[str, Space]) -> str:
    def one(space: Space) -> str:
        if isinstance(space, Discrete):
            return f"classes {space.classes} {list(space.shape)}"
        return f"{space.dtype} {list(space.shape)}"

    return ", ".join(f"{name}: {one(space)}" for name, space in spaces.items())
