"""Replay: a ring of rows per environment, written and read inside the program.

Every array is (environment, capacity, ...), so the environment axis can be sharded, and one slice
update adds a row of all environments. Beside each row lies a memo: whatever the agent returned when
it acted on that row. The replay never looks inside.

Agents that learn from "windows" get T + 1 consecutive rows of one environment, which may cross the
ends of episodes. Row 0 is context: its memo says where the agent was. Rows 1..T are trained, and
the agent's fresh memos of them replace the stored ones. The replay first gives every new window
once: it cuts each environment's rows into consecutive windows, which wait in a queue, and fills the
rest of a batch with uniform ones. The queue needs no storage, because all environments advance
together: its content follows from counters. With `context_every` k the replay keeps the memo of
every k-th row, and windows begin at these rows.
Source: DreamerV3 (arXiv:2301.04104) and its public code.

Agents that learn from the "newest" rows get the last T + 1 rows of every environment in order, with
all their memos.

The rings lie on the device. `replay.host` keeps the same rings in numpy, in the host's memory, and
uses `choose` and `places` of this module.
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.replay.config import ReplayConfig
from jaxwm.types import Array, Bool, Int, JaxwmError, Key, PyTree, Step, Window


class Buffer(NamedTuple):
    """The rings.

    Attributes:
      rows: the rows (environment, capacity, ...).
      memo: the memos of every k-th row (environment, capacity / k, ...).
    """

    rows: Step
    memo: PyTree


class Cursor(NamedTuple):
    """Where the rings stand; the same for all environments and all seeds of a program."""

    written: Int[Array, ""]  # rows ever added to each ring
    online: Int[Array, ""]  # windows ever taken from the queue


class Replay(NamedTuple):
    """A replay as pure functions.

    Attributes:
      shapes: the `Buffer` of shapes.
      init: `() -> Buffer, Cursor`.
      add: `buffer, cursor, rows (N, ...), memo (N, ...) -> buffer, cursor`.
      choose: `cursor, key -> env (B,), start (B,), cursor`, the windows of a batch: environment
        and first row, counted from the start of the run.
      sample: `buffer, cursor, key -> Window, cursor`.
      write_back: `buffer, window, memo (T, B) | None, taken=True -> buffer`; the buffer as it was
        if there is no memo or the update was not taken.
      data: "windows" or "newest".
      length: trained rows T of a window.
      warmup: rows of each environment that make enough windows to train.
      nbytes: size of the buffer in bytes.
    """

    shapes: Buffer
    init: Callable[[], tuple[Buffer, Cursor]]
    add: Callable[..., tuple[Buffer, Cursor]]
    choose: Callable[[Cursor, Key], tuple[Array, Array, Cursor]]
    sample: Callable[..., tuple[Window, Cursor]]
    write_back: Callable[..., Buffer]
    data: Literal["windows", "newest"]
    length: int
    warmup: int
    nbytes: int


def replay(
    config: ReplayConfig,
    row: Step,
    memo: PyTree,
    data: Literal["windows", "newest"] = "windows",
) -> Replay:
    """The replay for rows and memos like the given ones.

    Args:
      config: size and use.
      row: one row of all N environments, (N, ...); arrays or their shapes.
      memo: their memos, (N, ...); arrays or their shapes.
      data: what the agent learns from.

    Raises:
      JaxwmError: if a window does not fit, or the settings do not fit `data`.
    """
    count = row.is_first.shape[0]
    capacity, length, every = config.rows_per_env(count), config.batch_length, config.context_every
    if data == "newest":
        config.check_newest(count)
        capacity, warmup = length + 1, 2
        choose = functools.partial(_choose_newest, count, length)
    else:
        # As many windows as a batch has rows, as in the reference, if the rings hold so many.
        windows = min(config.batch_size * length, count * (capacity - length))
        warmup = length + max(1, -(-windows // count))
        choose = functools.partial(_choose_windows, config, count, capacity)

    def empty(tree: PyTree, size: int) -> PyTree:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, size, *x.shape[1:]), x.dtype), tree
        )

    shapes = Buffer(empty(row, capacity), empty(memo, capacity // every))
    nbytes = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(shapes))

    def init() -> tuple[Buffer, Cursor]:
        zero = jnp.zeros((), jnp.int32)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), Cursor(zero, zero)

    def sample(buffer: Buffer, cursor: Cursor, key: Key) -> tuple[Window, Cursor]:
        env, start, cursor = choose(cursor, key)
        window = read(buffer, env, start, length, all_memos=data == "newest")
        return window._replace(steps=close_abandoned(window.steps)), cursor

    functions = (shapes, init, add, choose, sample, write_back)
    return Replay(*functions, data=data, length=length, warmup=warmup, nbytes=nbytes)


def add(buffer: Buffer, cursor: Cursor, rows: Step, memo: PyTree) -> tuple[Buffer, Cursor]:
    """Writes a row (N, ...) of all environments, and its memo where one is kept."""
    every = memo_spacing(buffer)
    place = cursor.written % buffer.rows.is_first.shape[1]

    def put(ring: Array, value: Array, at: Array, keep: Array | bool = True) -> Array:
        value = value[:, None].astype(ring.dtype)
        if keep is not True:
            value = jnp.where(keep, value, jax.lax.dynamic_slice_in_dim(ring, at, 1, 1))
        return jax.lax.dynamic_update_slice_in_dim(ring, value, at, 1)

    keep = True if every == 1 else place % every == 0
    buffer = Buffer(
        jax.tree.map(lambda ring, x: put(ring, x, place), buffer.rows, rows),
        jax.tree.map(lambda ring, x: put(ring, x, place // every, keep), buffer.memo, memo),
    )
    return buffer, cursor._replace(written=cursor.written + 1)


def _choose_newest(
    count: int, length: int, cursor: Cursor, key: Key
) -> tuple[Array, Array, Cursor]:
    """The last `length + 1` rows of all `count` environments; `key` is not needed."""
    start = jnp.full((count,), cursor.written - length - 1)
    return jnp.arange(count), start, cursor


def _choose_windows(
    config: ReplayConfig, count: int, capacity: int, cursor: Cursor, key: Key
) -> tuple[Array, Array, Cursor]:
    """New windows from the queue, then uniform ones, of `count` rings of `capacity` rows."""
    length, batch, every = config.batch_length, config.batch_size, config.context_every
    key_env, key_start = jax.random.split(key)
    oldest = jnp.maximum(cursor.written - capacity, 0)
    env = jax.random.randint(key_env, (batch,), 0, count)
    first, stop = -(-oldest // every), (cursor.written - length - 1) // every + 1
    start = jax.random.randint(key_start, (batch,), first, stop) * every
    if not config.online:
        return env, start, cursor
    # Windows may begin at few rows only: then the first row of one is the last of the one before.
    stride = length + 1 if every == 1 else length
    # Window w of the queue: rows (w // N) * stride onwards of environment w % N.
    whole = (cursor.written - (length + 1 - stride)) // stride * count
    kept = -(-oldest // stride) * count
    head = jnp.maximum(cursor.online, kept)
    window = head + jnp.arange(batch)
    queued = window < whole
    env = jnp.where(queued, window % count, env)
    start = jnp.where(queued, window // count * stride, start)
    return env, start, cursor._replace(online=jnp.clip(whole, head, head + batch))


def write_back(
    buffer: Buffer, window: Window, memo: PyTree | None, taken: Array | bool = True
) -> Buffer:
    """Replaces the memos of trained rows.

    Args:
      buffer: the rings.
      window: the batch.
      memo: fresh memos (T, B) of rows 1..T; None leaves the buffer as it is.
      taken: whether the update was taken; if not, the buffer stays as it is.
    """
    if memo is None:
        return buffer
    (count, capacity), every = buffer.rows.is_first.shape, memo_spacing(buffer)
    stored = lambda x: x[every - 1 :: every]  # noqa: E731
    # Writes beyond the last environment are dropped.
    env = jnp.where(taken & stored(is_last_copy(window, capacity)), window.env[None], count)
    at = (env, stored(window.index[1:]) // every)

    def put(ring: Array, fresh: Array) -> Array:
        fresh = stored(fresh).astype(ring.dtype)
        return ring.at[at].set(fresh, mode="drop", unique_indices=True)

    return buffer._replace(memo=jax.tree.map(put, buffer.memo, memo))


def is_last_copy(window: Window, capacity: int) -> Bool[Array, "T B"]:
    """Which trained rows of a batch are in no other of its windows, or come last there.

    A row that windows share lies latest in the window that begins first; of two windows that begin
    together the second one counts. Without this choice a GPU would make several writes to one place
    in any order.

    Args:
      window: a batch.
      capacity: rows of each ring.
    """
    index = window.index[1:]
    length, batch = index.shape
    first = index[0]
    earlier = (first[:, None] - first[None]) % capacity  # rows from the start of j to that of i
    order = jnp.arange(batch)
    wins = (earlier > 0) | (order[None] > order[:, None])
    wins &= (earlier < length) & (window.env[:, None] == window.env[None])
    shared = length - jnp.where(wins, earlier, length).min(1)
    return jnp.arange(length)[:, None] >= shared[None]


def memo_spacing(buffer: Buffer) -> int:
    """Rows from one whose memo is kept to the next; 1 if memos are empty.

    Works for arrays, numpy and shapes, with or without an axis of seeds in front.
    """
    first = buffer.rows.is_first
    memos = jax.tree.leaves(buffer.memo)
    return first.shape[-1] // memos[0].shape[len(first.shape) - 1] if memos else 1


def places(start: Any, length: int, capacity: int, xp: Any = jnp) -> Any:
    """Where the rows of windows lie in their rings, in jax or numpy.

    Args:
      start: first row of each window (..., B), counted from the start of the run.
      length: trained rows T.
      capacity: rows of each ring.
      xp: jax.numpy or numpy, as `start` is.

    Returns:
      Places (..., T + 1, B).
    """
    rows = xp.arange(length + 1).reshape(*(1,) * (start.ndim - 1), -1, 1)
    return (start[..., None, :] + rows) % capacity


def read(
    buffer: Buffer,
    env: Int[Array, " B"],
    start: Int[Array, " B"],
    length: int,
    all_memos: bool = False,
) -> Window:
    """The windows of `length + 1` rows that begin at given rows.

    Args:
      buffer: the rings.
      env: environment of each window.
      start: first row of each window, the context, counted from the start of the run.
      length: trained rows T.
      all_memos: whether to read the memos of all rows, instead of those of row 0.
    """
    place = places(start, length, buffer.rows.is_first.shape[1])
    rows = jax.tree.map(lambda ring: ring[env[None], place], buffer.rows)
    at = (env[None], place) if all_memos else (env, place[0] // memo_spacing(buffer))
    memo = jax.tree.map(lambda ring: ring[at], buffer.memo)
    return Window(memo, rows, env, place)


def close_abandoned(rows: Step) -> Step:
    """Marks `is_last` where the next row of a window (T + 1, B) starts another episode.

    Only episodes that were abandoned, by a crash or a resume, need it; the last row stays.
    """
    follows = jnp.concatenate([rows.is_first[1:], jnp.zeros_like(rows.is_first[:1])])
    return rows._replace(is_last=rows.is_last | follows)


def check_fits(
    nbytes: int, what: str = "The replay", place: Literal["device", "host"] = "device"
) -> None:
    """Refuses to allocate more bytes than there are.

    Args:
      nbytes: bytes to allocate.
      what: what they are for.
      place: in whose memory.

    Raises:
      JaxwmError: stating both sizes.
    """
    device = jax.local_devices()[0]
    limit = device_bytes() if place == "device" else _host_bytes()
    if nbytes > 0.9 * limit:
        where = f"the device ({device.device_kind})" if place == "device" else "this host"
        raise JaxwmError(
            f"{what} needs {nbytes / 2**30:.1f} GiB and {where} has {limit / 2**30:.1f} GiB. "
            "Lower --replay.capacity, or the number of seeds if there are several."
        )


def device_bytes() -> int:
    """The memory of the device; that of this machine, if the device has none of its own."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or _host_bytes()


def _host_bytes() -> int:
    """The memory of this machine, or of the container that this process is confined to."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    except (OSError, ValueError):  # another system, or "max"
        return machine
