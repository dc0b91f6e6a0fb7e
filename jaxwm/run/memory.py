"""How much of the device's memory a run takes, estimated before anything is allocated."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.config import require
from jaxwm.recipes import RunConfig
from jaxwm.replay.device import device_bytes
from jaxwm.train import Chunk, Program
from jaxwm.types import JaxwmError

# The flags that change each part, the strongest first.
_FLAGS = {
    "replay": ("--replay.capacity", "--replay.context-every", "--seeds"),
    "parameters": ("--size", "--seeds"),
    "optimiser": ("--size", "--seeds"),
    "activations": ("--replay.batch-size", "--replay.batch-length", "--size"),
    "environments": ("--envs", "--seeds"),
    "saving": ("--save-every", "--replay.capacity", "--size"),
}


class Use(NamedTuple):
    """Bytes of each memory, over all members in it: the cores of a CPU share one."""

    replay: int
    parameters: int
    optimiser: int  # with target networks, statistics and counters
    activations: int  # whatever the compiled program needs beside the state
    environments: int  # their states, the present rows, accounts
    saving: int  # copies of what a checkpoint writes


def estimate(program: Program, chunk: Chunk, config: RunConfig) -> Use:
    """What a compiled run takes; a replay in the host's memory counts as nothing."""
    state = program.shapes()
    on_device = lambda tree: sum(_bytes(x) for x in jax.tree.leaves(tree))  # noqa: E731
    replay, parameters = on_device(state.buffer), on_device(state.agent.params)
    optimiser = on_device(state.agent.rest)
    others = on_device(state) - replay - parameters - optimiser
    # The rows since the save before the last, all memos, and everything outside the replay.
    capacity = state.buffer.rows.is_first.shape[-1]
    all_rows = on_device(state.buffer.rows)
    rows = min(1.0, 2 * config.save_every / config.envs / capacity) * all_rows
    memo = replay - all_rows
    saved = rows + memo + parameters + optimiser + others
    if not jax.local_devices()[0].memory_stats():
        # The device has no memory of its own, so that the copies which Orbax makes of each array in
        # the host's memory are there too. It writes memos in eighths.
        saved += max(rows, memo / 8)
    found = replay, parameters, optimiser, chunk.temporary, others, int(saved)
    return Use(*(program.layout.sharing * part for part in found))


def ensure_free(used: Use) -> None:
    """Refuses a run that the device cannot hold.

    Raises:
      JaxwmError: with the largest parts, and the flags that change them.
    """
    total, limit = sum(used), device_bytes()
    require(
        total <= 0.95 * limit,
        f"The run needs {size(total)} and the device ({jax.devices()[0].device_kind}) has "
        f"{size(limit)}: {_parts(used)}. Lower {flags(used)}.",
    )


@contextlib.contextmanager
def in_words(used: Use | None = None, lower: str | None = None) -> Iterator[None]:
    """Says what to do when the device runs out of memory while the body runs.

    Args:
      used: what the run takes, once it is known.
      lower: the flags to lower, if they are not those of a training.

    Raises:
      JaxwmError: with the largest parts, and the flags that change them.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lower = lower or (
            flags(used) if used else "--replay.capacity, --replay.batch-size or --size"
        )
        parts = f" The run takes {_parts(used)}." if used else ""
        raise JaxwmError(
            f"{jax.devices()[0].device_kind} ran out of memory: {str(error).splitlines()[0]}"
            f"{parts} Other programs may use some of it too. Lower {lower}."
        ) from error


def line(used: Use) -> str:
    """The parts in one line, beside what the device has."""
    return (
        f"Memory: {_parts(used)}; together {size(sum(used))} of {size(device_bytes())}. "
        f"Most changed by {flags(used)}."
    )


def flags(used: Use) -> str:
    """The three flags that change the use most."""
    found: list[str] = []
    for name in _largest(used):
        found += [flag for flag in _FLAGS[name] if flag not in found]
    return f"{', '.join(found[:2])} or {found[2]}"


def size(count: float) -> str:
    """Bytes for people: 832 B, 41.2 MB, 1.55 GB."""
    power = min(max(int(math.log(max(count, 1), 1000)), 0), 4)
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{count:.0f} B" if power == 0 else f"{count / 1000**power:.3g} {unit}"


def _parts(used: Use) -> str:
    return ", ".join(f"{name} {size(getattr(used, name))}" for name in _largest(used))


def _largest(used: Use) -> list[str]:
    return sorted(used._fields, key=lambda name: -getattr(used, name))


def _bytes(leaf: Any) -> int:
    """Bytes of a shape on one device; what is numpy lies in the host's memory."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return 0
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize
