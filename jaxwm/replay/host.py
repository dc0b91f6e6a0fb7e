"""The rings of `replay.device` in numpy, in the host's memory, which may be larger.

A `Buffer` of numpy arrays (..., environment, capacity, ...), where seeds side by side add an axis
in front. These functions write it in place. The device gets a window in two parts: its rows
(`read`), which never change, so that they can be gathered while the device makes the update before;
and the memos (`memos`), after that update has been written back.

The arrays are ordinary, pageable memory: a batch is megabytes, which the device fetches in a
fraction of an update.
"""

from typing import Any

import jax
import numpy as np

from jaxwm.replay.device import Buffer, memo_spacing, places
from jaxwm.types import PyTree, Step


def empty(shapes: Buffer, lead: tuple[int, ...] = ()) -> Buffer:
    """Rings of zeros; the system gives their memory only as rows arrive.

    Args:
      shapes: the rings of one seed, `Replay.shapes`.
      lead: the number of seeds, if there are several.
    """
    return jax.tree.map(lambda x: np.zeros((*lead, *x.shape), x.dtype), shapes)


def outline(shapes: Buffer, lead: tuple[int, ...] = ()) -> Buffer:
    """Arrays like those of `empty` that take no memory, for their shapes and for being numpy."""

    def one(x: Any) -> np.ndarray:
        return np.broadcast_to(np.zeros((), x.dtype), (*lead, *x.shape))

    return jax.tree.map(one, shapes)


def add(buffer: Buffer, written: int, rows: Step, memo: PyTree) -> None:
    """Writes a row of every environment, and its memo where one is kept.

    Args:
      buffer: the rings.
      written: rows added before.
      rows: the rows (..., N), in numpy.
      memo: their memos (..., N), in numpy.
    """
    axis = buffer.rows.is_first.ndim - 1
    place, every = written % buffer.rows.is_first.shape[-1], memo_spacing(buffer)

    def put(ring: np.ndarray, value: np.ndarray, at: int) -> None:
        ring[(*(slice(None),) * axis, at)] = value

    jax.tree.map(lambda ring, x: put(ring, x, place), buffer.rows, rows)
    if place % every == 0:
        jax.tree.map(lambda ring, x: put(ring, x, place // every), buffer.memo, memo)


def read(buffer: Buffer, env: np.ndarray, start: np.ndarray, length: int) -> Step:
    """The rows (..., T + 1, B) of windows.

    Args:
      buffer: the rings.
      env: environment of each window (..., B).
      start: first row of each window (..., B), the context, counted from the start of the run.
      length: trained rows T.
    """
    at = _index(buffer, env, start, length)
    return jax.tree.map(lambda ring: ring[at], buffer.rows)


def memos(
    buffer: Buffer, env: np.ndarray, start: np.ndarray, length: int, every_row: bool = False
) -> PyTree:
    """The memos of windows.

    Args:
      buffer: the rings.
      env: as in `read`.
      start: as in `read`.
      length: as in `read`.
      every_row: whether to read the memos (..., T + 1, B) of all rows, instead of those (..., B) of
        row 0.
    """
    if every_row:
        at = _index(buffer, env, start, length)
    else:
        *where, place = (x[..., 0, :] for x in _index(buffer, env, start, 0))
        at = (*where, place // memo_spacing(buffer))
    return jax.tree.map(lambda ring: ring[at], buffer.memo)


def write_back(
    buffer: Buffer,
    env: np.ndarray,
    start: np.ndarray,
    length: int,
    memo: PyTree | None,
    taken: np.ndarray | bool = True,
) -> None:
    """Replaces the memos of trained rows.

    Args:
      buffer: the rings.
      env: as in `read`.
      start: as in `read`.
      length: as in `read`.
      memo: fresh memos (..., T, B) of rows 1..T; None leaves the buffer as it is.
      taken: which updates (...) were taken; the memos of others stay.
    """
    if memo is None:
        return
    every = memo_spacing(buffer)
    *where, place = (x[..., every::every, :] for x in _index(buffer, env, start, length))
    keep = np.broadcast_to(np.asarray(taken)[..., None, None], place.shape)
    # One flat list: if two windows share a row, the memo of the later one stays, as on the device.
    at = tuple(x[keep] for x in (*where, place // every))
    stored = (slice(None),) * (env.ndim - 1) + (slice(every - 1, None, every),)

    def put(ring: np.ndarray, fresh: np.ndarray) -> None:
        ring[at] = fresh[stored][keep]

    jax.tree.map(put, buffer.memo, memo)


def _index(
    buffer: Buffer, env: np.ndarray, start: np.ndarray, length: int
) -> tuple[np.ndarray, ...]:
    """Seed, if there is that axis, environment and place of each row (..., T + 1, B)."""
    place = places(start, length, buffer.rows.is_first.shape[-1], np)
    seeds = () if env.ndim == 1 else (np.arange(len(env))[:, None, None],)
    return tuple(np.broadcast_to(x, place.shape) for x in (*seeds, env[..., None, :], place))
