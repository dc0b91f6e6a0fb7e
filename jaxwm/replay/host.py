"""The rings of `replay` in numpy, in the host's memory, which may be larger than the device's.

A `Buffer` of numpy arrays (..., environment, capacity, ...), where seeds side by side add an axis
in front. It is written in place. What of a window the device needs is read in two parts: its rows
(`read`), which never change, so that they can be gathered while the device makes the update before;
and the latent of its context row (`context`), after that update has been written back.

The arrays are ordinary, pageable memory: a batch is megabytes, which take the device a fraction of
an update to fetch.
"""

from typing import Any

import jax
import numpy as np

from jaxwm.replay.device import Buffer, Packed, places
from jaxwm.types import Step


def empty(shapes: Buffer, lead: tuple[int, ...] = ()) -> Buffer:
    """Rings of zeros; the system gives their memory only as rows arrive.

    Args:
      shapes: the rings of one seed, `Replay.shapes`.
      lead: the number of seeds, if there are several.
    """
    return jax.tree.map(lambda x: np.zeros((*lead, *x.shape), x.dtype), shapes)


def outline(shapes: Buffer, lead: tuple[int, ...] = ()) -> Buffer:
    """What `empty` makes, for its shapes and for being numpy: arrays that take no memory."""

    def one(x: Any) -> np.ndarray:
        return np.broadcast_to(np.zeros((), x.dtype), (*lead, *x.shape))

    return jax.tree.map(one, shapes)


def add(buffer: Buffer, written: int, rows: Step, latents: Packed) -> None:
    """Writes a row of every environment.

    Args:
      buffer: the rings.
      written: rows added before.
      rows: the rows (..., N), in numpy.
      latents: their latents (..., N), in numpy.
    """

    axis = buffer.rows.is_first.ndim - 1
    place, every = written % buffer.rows.is_first.shape[-1], _every(buffer)

    def put(ring: Any, value: Any, at: int) -> None:
        ring[(*(slice(None),) * axis, at)] = value

    jax.tree.map(lambda ring, x: put(ring, x, place), buffer.rows, rows)
    if place % every == 0:
        put(buffer.deter, latents.deter, place // every)
        put(buffer.stoch, latents.stoch, place // every)


def read(buffer: Buffer, env: np.ndarray, start: np.ndarray, length: int) -> Step:
    """The trained rows (..., T, B) of windows.

    Args:
      buffer: the rings.
      env: environment of each window (..., B).
      start: first row of each window (..., B), the context, counted from the start of the run.
      length: trained rows T.
    """
    at = _index(buffer, env, start, length)
    at = tuple(x[..., 1:, :] for x in at)
    return jax.tree.map(lambda ring: ring[at], buffer.rows)


def context(buffer: Buffer, env: np.ndarray, start: np.ndarray) -> Packed:
    """The stored latents (..., B) of the first rows of windows; arguments as in `read`."""
    *at, place = (x[..., 0, :] for x in _index(buffer, env, start, 0))
    at = (*at, place // _every(buffer))
    return Packed(buffer.deter[at], buffer.stoch[at])


def write_back(
    buffer: Buffer,
    env: np.ndarray,
    start: np.ndarray,
    latents: Packed,
    taken: np.ndarray | bool = True,
) -> None:
    """Writes the fresh latents (..., T, B) of trained rows, of updates that were taken (...).

    Other arguments as in `read`.
    """
    length, every = latents.stoch.shape[-3], _every(buffer)
    *index, place = (x[..., every::every, :] for x in _index(buffer, env, start, length))
    index = (*index, place // every)
    deter, stoch = (x[..., every - 1 :: every, :, :] for x in latents)
    keep = np.broadcast_to(np.asarray(taken)[..., None, None], index[0].shape)
    # One flat list: of a row in two windows the later latent stays, as on the device.
    at = tuple(x[keep] for x in index)
    buffer.deter[at], buffer.stoch[at] = deter[keep], stoch[keep]


def _every(buffer: Buffer) -> int:
    """Rows from one whose latent is stored to the next."""
    return buffer.rows.is_first.shape[-1] // buffer.stoch.shape[-2]


def _index(
    buffer: Buffer, env: np.ndarray, start: np.ndarray, length: int
) -> tuple[np.ndarray, ...]:
    """Seed, if there is that axis, environment and place of each row (..., T + 1, B)."""
    place = places(start, length, buffer.rows.is_first.shape[-1], np)
    seeds = () if env.ndim == 1 else (np.arange(len(env))[:, None, None],)
    return tuple(np.broadcast_to(x, place.shape) for x in (*seeds, env[..., None, :], place))
