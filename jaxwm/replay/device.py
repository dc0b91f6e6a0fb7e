"""Replay: a ring of rows per environment, written and sampled inside the program.

Every array is (environment, capacity, ...): the environment axis can be sharded, and adding a
row for all environments is one slice update. Windows are T + 1 consecutive rows of one
environment and may cross episode ends; row 0 is context only: its stored latent is the carry
from which rows 1..T are trained. Fresh latents are written back after training.

New windows are trained on once before any other: each environment's rows are cut into
consecutive windows, which wait in a queue; the rest of a batch is uniform. The queue needs no
storage, because all environments advance together: its content is a function of counters.
With `context_every` k only the latent of every k-th row is stored, and windows begin there.
Source: DreamerV3 (arXiv:2301.04104) and its public code.

The rings lie on the device. `replay_host` keeps the same rings in numpy, in the host's memory;
which windows are sampled (`Replay.choose`, `places`) and what is kept of a latent (`pack`) is said
here for both.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.config import positive, require
from jaxwm.types import Array, Bool, Int, JaxwmError, Key, Latent, Step


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Size and use of the replay.

    Args:
      capacity: rows kept in all, over all environments.
      batch_size: windows B per update.
      batch_length: trained rows T per window.
      train_ratio: rows trained on per environment step, as a fraction with a denominator of at most
        1000; updates per environment step are then train_ratio / (B * T), kept exactly over a run.
        0 collects and never learns.
      online: whether every new window is trained on once before the uniform ones.
      context_every: rows from one whose latent is stored to the next; windows begin at these. As
        in the reference 1; a larger divisor of `batch_length` saves memory.
      place: where the rows lie: in the device's memory, or, for simulators on the host, in the
        host's, which is often larger. The run is the same.
    """

    capacity: int = 5_000_000
    batch_size: int = 16
    batch_length: int = 64
    train_ratio: float = 32.0
    online: bool = True
    context_every: int = 1
    place: Literal["device", "host"] = "device"

    def __post_init__(self):
        positive(self, "capacity", "batch_size", "batch_length", "context_every")
        ratio = self.train_ratio
        require(ratio <= 1e6, f"The replay's train_ratio is {ratio}; it must be at most 1e6.")
        require(
            ratio == 0 or ratio >= 1e-3,
            f"The replay's train_ratio is {ratio}; it must be positive, at least 0.001, or 0 to "
            "collect and never learn.",
        )
        require(
            self.batch_length >= 2,
            "The replay's batch_length is 1; it must be at least 2, for in a window of one row no "
            "step follows to learn from.",
        )
        require(
            self.batch_length % self.context_every == 0,
            f"The replay's context_every is {self.context_every}, which does not divide its "
            f"batch_length of {self.batch_length}. Choose a divisor.",
        )

    def updates_per_iteration(self, envs: int) -> Fraction:
        """Updates that one step of each of `envs` environments earns, as an exact fraction."""
        ratio = Fraction(self.train_ratio).limit_denominator(1000)
        return envs * ratio / (self.batch_size * self.batch_length)

    def rows_per_env(self, envs: int) -> int:
        """Capacity of each of `envs` rings, a multiple of `context_every`.

        Raises:
          JaxwmError: if a window does not fit into a ring.
        """
        rows = self.capacity // envs // self.context_every * self.context_every
        if rows < self.batch_length + 1:
            raise JaxwmError(
                f"A replay of {self.capacity} rows gives each of {envs} environments {rows}, "
                f"fewer than the {self.batch_length + 1} rows of one window (batch_length + 1). "
                "Raise the capacity, or lower batch_length or the number of environments."
            )
        return rows


class Buffer(NamedTuple):
    """What is stored; leading axes (environment, capacity), of latents (environment, contexts)."""

    rows: Step
    deter: Array  # (..., D), compute type
    stoch: Array  # (..., S), class indices


class Cursor(NamedTuple):
    """Where the rings stand; the same for all environments and all seeds of a program."""

    written: Int[Array, ""]  # rows ever added to each ring
    online: Int[Array, ""]  # windows ever taken from the queue


class Window(NamedTuple):
    """A sampled batch."""

    context: Latent  # (B, ...), the carry before row 0 of `steps`
    steps: Step  # (T, B, ...)
    env: Int[Array, " B"]
    index: Int[Array, "T B"]  # places of `steps` in the rings


class Packed(NamedTuple):
    """What is kept of latents."""

    deter: Array  # (..., D), compute type
    stoch: Array  # (..., S), class indices


class Replay(NamedTuple):
    """A replay as pure functions.

    Attributes:
      shapes: the `Buffer` of shapes.
      init: `() -> Buffer, Cursor`.
      add: `buffer, cursor, rows (N, ...), latents (N, ...) -> buffer, cursor`.
      choose: `cursor, key -> env (B,), start (B,), cursor`, the windows of a batch: environment
        and first row, counted from the start of the run.
      sample: `buffer, cursor, key -> Window, cursor`.
      write_back: `buffer, window, latents (T, B), taken=True -> buffer`; as it was if not taken.
      warmup: rows of each environment from which on there are enough windows to train.
      nbytes: size of the buffer in bytes.
    """

    shapes: Buffer
    init: Callable[[], tuple[Buffer, Cursor]]
    add: Callable[..., tuple[Buffer, Cursor]]
    choose: Callable[[Cursor, Key], tuple[Array, Array, Cursor]]
    sample: Callable[..., tuple[Window, Cursor]]
    write_back: Callable[..., Buffer]
    warmup: int
    nbytes: int


def replay(config: ReplayConfig, row: Step, latent: Latent) -> Replay:
    """The replay for rows and latents like the given ones.

    Args:
      config: size and use.
      row: one row of all N environments, (N, ...); arrays or their shapes.
      latent: their latents, (N, ...); arrays or their shapes.

    Raises:
      JaxwmError: if a window does not fit.
    """
    count = row.is_first.shape[0]
    capacity = config.rows_per_env(count)
    length, batch = config.batch_length, config.batch_size
    classes, every = latent.stoch.shape[-1], config.context_every
    # Where latents are few, the first row of a window is the last of the one before.
    stride = length + 1 if every == 1 else length

    def empty(tree: Any, size: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, size, *x.shape[1:]), x.dtype), tree
        )

    packed = empty(jax.eval_shape(pack, latent), capacity // every)
    shapes = Buffer(empty(row, capacity), *packed)
    nbytes = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(shapes))

    def init() -> tuple[Buffer, Cursor]:
        zero = jnp.zeros((), jnp.int32)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), Cursor(zero, zero)

    def add(buffer: Buffer, cursor: Cursor, rows: Step, latents: Latent) -> tuple[Buffer, Cursor]:
        place = cursor.written % capacity

        def put(ring: Array, value: Array, at: Array, keep: Array | bool = True) -> Array:
            value = value[:, None].astype(ring.dtype)
            if keep is not True:
                value = jnp.where(keep, value, jax.lax.dynamic_slice_in_dim(ring, at, 1, 1))
            return jax.lax.dynamic_update_slice_in_dim(ring, value, at, 1)

        keep = True if every == 1 else place % every == 0
        new = pack(latents)
        buffer = Buffer(
            jax.tree.map(lambda ring, x: put(ring, x, place), buffer.rows, rows),
            put(buffer.deter, new.deter, place // every, keep),
            put(buffer.stoch, new.stoch, place // every, keep),
        )
        return buffer, cursor._replace(written=cursor.written + 1)

    def choose(cursor: Cursor, key: Key) -> tuple[Array, Array, Cursor]:
        key_env, key_start = jax.random.split(key)
        oldest = jnp.maximum(cursor.written - capacity, 0)
        env = jax.random.randint(key_env, (batch,), 0, count)
        first, stop = -(-oldest // every), (cursor.written - length - 1) // every + 1
        start = jax.random.randint(key_start, (batch,), first, stop) * every
        if not config.online:
            return env, start, cursor
        # Window w of the queue: rows (w // N) * stride onwards of environment w % N.
        whole = (cursor.written - (length + 1 - stride)) // stride * count
        kept = -(-oldest // stride) * count
        head = jnp.maximum(cursor.online, kept)
        window = head + jnp.arange(batch)
        queued = window < whole
        env = jnp.where(queued, window % count, env)
        start = jnp.where(queued, window // count * stride, start)
        return env, start, cursor._replace(online=jnp.clip(whole, head, head + batch))

    def sample(buffer: Buffer, cursor: Cursor, key: Key) -> tuple[Window, Cursor]:
        env, start, cursor = choose(cursor, key)
        window = read(buffer, env, start, length, classes)
        return window._replace(steps=close_abandoned(window.steps)), cursor

    def write_back(
        buffer: Buffer, window: Window, latents: Latent, taken: Array | bool = True
    ) -> Buffer:
        stored = lambda x: x[every - 1 :: every]  # noqa: E731
        # What goes beyond the last environment is dropped.
        env = jnp.where(taken & stored(is_last_copy(window, capacity)), window.env[None], count)
        at = (env, stored(window.index) // every)
        fresh = pack(jax.tree.map(stored, latents))

        def put(ring: Array, new: Array) -> Array:
            return ring.at[at].set(new.astype(ring.dtype), mode="drop", unique_indices=True)

        return buffer._replace(
            deter=put(buffer.deter, fresh.deter), stoch=put(buffer.stoch, fresh.stoch)
        )

    # As many windows as the rows of a batch, as in the reference, if the rings hold so many.
    windows = min(batch * length, count * (capacity - length))
    warmup = length + max(1, -(-windows // count))
    return Replay(shapes, init, add, choose, sample, write_back, warmup, nbytes)


def is_last_copy(window: Window, capacity: int) -> Bool[Array, "T B"]:
    """Which rows of a batch are in no other of its windows, or come last there.

    A row that windows share lies latest in the one that begins first, and of two that begin
    together the second counts. Which of several writes to one place a GPU makes last is left to
    chance.

    Args:
      window: a batch.
      capacity: rows of each ring.
    """
    length, batch = window.index.shape
    first = window.index[0]
    earlier = (first[:, None] - first[None]) % capacity  # rows from the start of j to that of i
    order = jnp.arange(batch)
    wins = (earlier > 0) | (order[None] > order[:, None])
    wins &= (earlier < length) & (window.env[:, None] == window.env[None])
    shared = length - jnp.where(wins, earlier, length).min(1)
    return jnp.arange(length)[:, None] >= shared[None]


def pack(latents: Latent) -> Packed:
    """What is kept of latents: of their one-hot classes only the indices, in bytes if they fit."""
    dtype = jnp.uint8 if latents.stoch.shape[-1] <= 256 else jnp.int32
    return Packed(latents.deter, jnp.argmax(latents.stoch, -1).astype(dtype))


def unpack(packed: Packed, classes: int) -> Latent:
    """The latents, of so many classes."""
    stoch = jax.nn.one_hot(packed.stoch, classes, dtype=packed.deter.dtype)
    return Latent(packed.deter, stoch)


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
    classes: int,
) -> Window:
    """The windows of `length + 1` rows that begin at given rows.

    Args:
      buffer: the rings.
      env: environment of each window.
      start: first row of each window, the context, counted from the start of the run.
      length: trained rows T.
      classes: classes K of the stored latent.

    Returns:
      The stored latent of the context row as carry, and the T rows after it.
    """
    capacity = buffer.rows.is_first.shape[1]
    place = places(start, length, capacity)
    rows = jax.tree.map(lambda ring: ring[env[None], place], buffer.rows)
    steps = jax.tree.map(lambda x: x[1:], rows)
    at = place[0] // (capacity // buffer.stoch.shape[1])
    context = Packed(buffer.deter[env, at], buffer.stoch[env, at])
    return Window(unpack(context, classes), steps, env, place[1:])


def close_abandoned(rows: Step) -> Step:
    """Marks `is_last` where the next row of a window (T, B) starts another episode.

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
