"""Pytrees as numbered arrays on the host, and back: what `checkpoint` stores, whatever the tree.

The leaves of a tree go by their number. Typed keys become their words, small arrays the bytes of
one array, and rows of a ring are copied in and out. What is numpy stays numpy, and on the host.
"""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

PACK = "small"
_SMALL = 1 << 20  # bytes of a leaf that is stored with others in one array


def describe(tree: PyTree) -> list[list[str]]:
    """Path and "dtype (shape)" of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    return [[path, f"{x.dtype} {tuple(x.shape)}"] for path, x in named]


def numbered(tree: PyTree) -> dict[str, Any]:
    """The leaves by number; empty arrays cannot be stored and need not be."""
    leaves = enumerate(jax.tree.leaves(tree))
    return {str(number): leaf for number, leaf in leaves if leaf.size > 0}


def resized(leaf: Any, size: int, axis: int) -> Any:
    """The shape of a leaf with so many rows; what is numpy stays so, and takes no memory."""
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    if isinstance(leaf, np.ndarray):
        return np.broadcast_to(np.zeros((), leaf.dtype), shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


def take(tree: PyTree, first: int, size: int, axis: int) -> PyTree:
    """Copies of so many rows of rings, from row `first` on, counted from the start of the run."""
    if isinstance(jax.tree.leaves(tree)[0], np.ndarray):
        return jax.tree.map(lambda x: x.take((first + np.arange(size)) % x.shape[axis], axis), tree)
    return _take_on_device(tree, np.int32(first), size, axis)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _take_on_device(tree: PyTree, first: Any, size: int, axis: int) -> PyTree:
    def take(x: Any) -> Any:
        return jnp.take(x, (first + jnp.arange(size)) % x.shape[axis], axis, mode="clip")

    return jax.tree.map(take, tree)


def put(tree: PyTree, new: PyTree, first: int, axis: int) -> PyTree:
    """Rings with the rows `new` from row `first` on; they are overwritten."""
    if isinstance(jax.tree.leaves(tree)[0], np.ndarray):

        def put(x: Any, new: Any) -> Any:
            index = (first + np.arange(new.shape[axis])) % x.shape[axis]
            x[(*(slice(None),) * axis, index)] = new
            return x

        return jax.tree.map(put, tree, new)
    return _put_on_device(tree, new, np.int32(first), axis)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put_on_device(tree: PyTree, new: PyTree, first: Any, axis: int) -> PyTree:
    def put(x: Any, new: Any) -> Any:
        index = (first + jnp.arange(new.shape[axis])) % x.shape[axis]
        return x.at[(*(slice(None),) * axis, index)].set(new, unique_indices=True)

    return jax.tree.map(put, tree, new)


def copy(tree: PyTree) -> dict[str, Any]:
    """Copies of the leaves, by number: the next dispatch overwrites the leaves themselves."""
    raw = {number: _raw(leaf) for number, leaf in numbered(tree).items()}
    here = {number: np.array(leaf) for number, leaf in raw.items() if not _is_jax(leaf)}
    return here | _copy_on_device({number: x for number, x in raw.items() if _is_jax(x)})


@jax.jit
def _copy_on_device(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _is_jax(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    """A typed key as numbers, anything else as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def place(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Shape, type and devices of an array to read; what is numpy is read as numpy."""
    if isinstance(leaf, np.ndarray):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=_where(leaf))


def _where(leaf: Any) -> Any:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def empty(leaf: Any) -> Any:
    """Zeros like a shape, or in numpy like an array."""
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype, device=_where(leaf))


def join(like: PyTree, found: dict[str, Any]) -> PyTree:
    """The tree `like` with the leaves that were read."""
    leaves, tree = jax.tree.flatten(like)
    full = []
    for number, leaf in enumerate(leaves):
        value: Any = found[str(number)] if leaf.size > 0 else empty(leaf)
        full.append(jax.random.wrap_key_data(value) if _is_key(leaf) else value)
    return jax.tree.unflatten(tree, full)


def small(part: dict[str, Any]) -> list[str]:
    """The numbers of the leaves that are stored in one array."""
    return [number for number, x in part.items() if x.nbytes < _SMALL and is_whole(x)]


def pack(part: dict[str, Any], small: list[str]) -> dict[str, Any]:
    """The arrays of a part as they are stored, the small ones as the bytes of all."""
    if not small:
        return part
    large = {number: leaf for number, leaf in part.items() if number not in small}
    return large | {PACK: np.concatenate([_bytes(part[number]) for number in small])}


def unpack(data: np.ndarray, small: dict[str, Any]) -> dict[str, Any]:
    """The small arrays of a part, on their devices but for what is numpy."""
    leaves, start = {}, 0
    for number, place in small.items():
        stop = start + size(place)
        leaf = data[start:stop].copy().view(place.dtype).reshape(place.shape)
        is_numpy = isinstance(place, np.ndarray)
        leaves[number] = leaf if is_numpy else jax.device_put(leaf, place.sharding, may_alias=False)
        start = stop
    return leaves


def size(place: Any) -> int:
    return math.prod(place.shape) * place.dtype.itemsize


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def sums(part: dict[str, Any]) -> dict[str, int]:
    """Checksums of leaves by number, of those that are here whole."""
    return {number: checksum(leaf) for number, leaf in part.items() if is_whole(leaf)}


def is_whole(leaf: Any) -> bool:
    return not _is_jax(leaf) or leaf.is_fully_addressable


def checksum(leaf: Any) -> int:
    return zlib.crc32(_bytes(leaf).data)
