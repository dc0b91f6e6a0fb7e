"""Rows whose numbers say where they belong, and rings of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.replay.config import ReplayConfig
from jaxwm.replay.device import Buffer, Cursor, Replay, replay
from jaxwm.types import Step

N, D, S = 3, 4, 2
CAPACITY, LENGTH, BATCH = 20, 4, 6


def rows(time: Any) -> tuple[Step, Any]:
    """Row `time` of all environments, and its memo: a pytree of several types and ranks."""
    tag = jnp.arange(N) * 1000 + time
    flags = jnp.zeros(N, bool)
    image = jnp.broadcast_to((tag % 251).astype(jnp.uint8)[:, None, None, None], (N, 2, 2, 3))
    obs = {"tag": tag, "image": image}
    step = Step(tag % 7, obs, tag.astype(jnp.float32), flags.at[:].set(time % 5 == 0), flags, flags)
    return step, memo_of(tag, jnp)


def memo_of(tag: Any, xp: Any = np) -> dict[str, Any]:
    """The memo (...) of rows with these numbers."""
    deter = xp.broadcast_to(tag[..., None].astype(xp.float32), (*tag.shape, D))
    places = xp.arange(S).reshape(*(1,) * tag.ndim, S)
    return {"deter": deter, "more": ((tag[..., None] + places).astype(xp.uint8), tag)}


@functools.cache
def make(
    online: bool, capacity: int = CAPACITY, batch: int = BATCH, every: int = 1, memos: bool = True
) -> tuple[Replay, Any]:
    """A replay and what fills it, compiled."""
    config = ReplayConfig(capacity * N, batch, LENGTH, online=online, context_every=every)
    return compiled(replay(config, *jax.eval_shape(lambda: given(0, memos))), memos)


def given(time: Any, memos: bool) -> tuple[Step, Any]:
    step, memo = rows(time)
    return step, memo if memos else ()


def compiled(memory: Replay, memos: bool = True) -> tuple[Replay, Any]:
    @jax.jit
    def fill(buffer: Buffer, cursor: Cursor, start: Any, stop: Any) -> tuple[Buffer, Cursor]:
        return jax.lax.fori_loop(
            start, stop, lambda t, c: memory.add(*c, *given(t, memos)), (buffer, cursor)
        )

    return memory._replace(sample=jax.jit(memory.sample)), fill


def filled(count: int, online: bool = False, **sizes: Any) -> tuple[Replay, Buffer, Cursor]:
    """The same after `count` rows."""
    memory, fill = make(online, **sizes)
    return memory, *fill(*memory.init(), 0, count)


def times(window: Any) -> tuple[np.ndarray, np.ndarray]:
    """When the rows (T + 1, B) of a window were added, and by which environment."""
    tag = np.asarray(window.steps.obs["tag"])
    return tag % 1000, tag // 1000


def bits(tree: Any) -> list[tuple[Any, ...]]:
    """Types, shapes and bytes of all leaves."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, x.tobytes()) for x in leaves]
