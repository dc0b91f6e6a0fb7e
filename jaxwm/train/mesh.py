"""Many devices: which holds what of a run, and what they tell each other.

A run divides environments, replay and batch of each member into shards. A shard is a small training
of its own: its environments fill its replay, from which it samples its part of every batch.
Experience never leaves it. Shards exchange, through `Shards`, the gradients and metrics of each
update, whatever statistics an agent takes over the whole batch, and once in a chunk the sums over
ended episodes.

The devices form a mesh with the axes "members" and "data". Each device holds some of the members,
and some of the shards of those. `jax.vmap` maps a device's members and shards, `jax.shard_map` the
devices; so shards meet over two axes, "shards" within a device and "data" across them. The number
of devices decides only where things lie. The results are equal up to float rounding until rounding
flips a sampled class; from there the runs diverge.

A `PartitionSpec` of "shards" and "members" says which axes an array leads with. A layout drops the
axes of which it has only one.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxwm.config import require
from jaxwm.envs.host import cores
from jaxwm.recipes import RunConfig
from jaxwm.types import ALONE, AgentState, Shards

P = PartitionSpec
MEMBERS, DATA, SHARDS = "members", "data", "shards"


class Layout(NamedTuple):
    """How a run lies on devices.

    Attributes:
      mesh: the devices in use, with the axes "members" and "data".
      members: members in all.
      shards: shards of each member.
      shard_params: whether each device holds only a part of parameters and optimiser.
    """

    mesh: Mesh
    members: int
    shards: int
    shard_params: bool

    @property
    def single(self) -> bool:
        """Whether there is nothing to divide: one device, and one shard of each member."""
        return self.mesh.size == 1 and self.shards == 1

    @property
    def sharing(self) -> int:
        """Devices that share one memory: the cores of a CPU, which have none of their own."""
        devices = self.mesh.local_devices
        return len(devices) if devices[0].memory_stats() is None else 1

    @property
    def members_here(self) -> int:
        """Members on each device."""
        return self.members // self.mesh.shape[MEMBERS]

    @property
    def shards_here(self) -> int:
        """Shards on each device, of each of its members."""
        return self.shards // self.mesh.shape[DATA]


def layout(config: RunConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a run on as many devices as shards and members can be divided among.

    Args:
      config: the run.
      devices: what there is; by default all devices of all processes.

    Raises:
      JaxwmError: if a process would have nothing to do.
    """
    devices = jax.devices() if devices is None else devices
    data, members = _grid(len(devices), config)
    used = devices[: members * data]
    busy, there = len({device.process_index for device in used}), jax.process_count()
    require(
        busy == there,
        f"{there} processes have {len(devices)} devices, and {config.shards} shards of "
        f"{config.members} members can use {len(used)} of them, those of {busy}. Give --shards or "
        "--seeds that the number of devices divides.",
    )
    grid = np.array(used).reshape(members, data)
    return Layout(Mesh(grid, (MEMBERS, DATA)), config.members, config.shards, config.shard_params)


def _grid(count: int, config: RunConfig) -> tuple[int, int]:
    """How many of `count` devices divide the shards, and the members."""
    data = math.gcd(count, config.shards)
    return data, math.gcd(count // data, config.members)


def use_cores(config: RunConfig) -> None:
    """Makes each core of a CPU a device, up to as many as can divide shards and members.

    A device on each core keeps all cores busy, while one device divides every operation among them,
    and small operations are not worth dividing. Call it before jax is used. It changes nothing if
    jax has been used, if something else says how many devices a CPU is, or if processes train
    together.
    """
    said = jax.config.values["jax_num_cpu_devices"] > 0
    said |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.distributed.is_initialized():
        return
    count = max(range(1, cores() + 1), key=lambda count: math.prod(_grid(count, config)))
    with contextlib.suppress(RuntimeError):  # jax has been used
        jax.config.update("jax_num_cpu_devices", count)


def shard_config(config: RunConfig) -> RunConfig:
    """The configuration of a single shard: its environments, its replay, its part of the batch."""
    count = config.shards
    memory = dataclasses.replace(
        config.replay,
        capacity=config.replay.capacity // count,
        batch_size=config.replay.batch_size // count,
    )
    envs = config.envs // count
    return dataclasses.replace(config, shards=1, shard_params=False, envs=envs, replay=memory)


def shards_of(layout: Layout, whole: AgentState | None = None) -> Shards:
    """How the shards of a layout meet, for functions that `spread` maps.

    Args:
      layout: where shards and members lie.
      whole: shapes of what one member learns, if devices hold only parts of it.
    """
    if layout.shards == 1:
        return ALONE
    here = (SHARDS,) * (layout.shards_here > 1)
    across = (DATA, *here)

    def all_gather(x: Any) -> Any:
        for axis in reversed(across):
            x = jax.lax.all_gather(x, axis)
        return x

    shards = Shards(
        own=lambda key: jax.random.fold_in(key, jax.lax.axis_index(across)),
        mean=lambda tree: jax.lax.pmean(tree, across),
        total=lambda tree: jax.lax.psum(tree, across),
        all_gather=all_gather,
    )
    return shards if whole is None else _in_parts(shards, whole, here, layout.mesh.shape[DATA])


def _in_parts(shards: Shards, whole: AgentState, here: tuple[str, ...], count: int) -> Shards:
    """Shards on `count` devices that hold only parts of what they learn.

    Args:
      shards: how they meet if they hold all of it.
      whole: shapes of what one member learns.
      here: the axis of the shards on one device, if there are several.
      count: devices.
    """

    def own_slice(x: Any) -> Any:
        axis = _cut(x.shape, count)
        if axis is None:
            return x
        size = x.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DATA) * size, size, axis)

    def gather(tree: Any, whole: Any) -> Any:
        def one(x: Any, shape: tuple[int, ...]) -> Any:
            axis = _cut(shape, count)
            return x if axis is None else jax.lax.all_gather(x, DATA, axis=axis, tiled=True)

        return jax.tree.map(one, tree, shapes_in(tree, whole, count))

    def mean(x: Any) -> Any:
        x, axis = jax.lax.pmean(x, here), _cut(x.shape, count)
        if axis is None:
            return jax.lax.pmean(x, DATA)
        return jax.lax.psum_scatter(x, DATA, scatter_dimension=axis, tiled=True) / count

    def sum_parts(numbers: Any) -> Any:
        def one(x: Any, shape: tuple[int, ...]) -> Any:
            return x if _cut(shape, count) is None else jax.lax.psum(x, DATA)

        return jax.tree.map(one, numbers, shapes_in(numbers, whole.params))

    return shards._replace(
        mean=lambda tree: jax.tree.map(mean, tree),
        slice=lambda state: jax.tree.map(own_slice, state),
        gather_params=lambda tree: gather(tree, whole.params),
        gather_rest=lambda tree: gather(tree, whole.rest),
        sum_parts=sum_parts,
        whole=False,
    )


def shapes_in(tree: Any, whole: Any, count: int | None = None) -> Any:
    """The whole shape of each leaf in a part of a tree, as a tree like `tree`.

    Agents pass subtrees, and optimisers for groups of parameters pass flat dicts by path, so paths
    say which leaf is which.

    Args:
      tree: a subtree of `whole`, or a dict of some of its leaves by path.
      whole: the tree, with whole shapes.
      count: if given, the number of devices of which `tree` holds one's part of each leaf.

    Raises:
      JaxwmError: if `tree` has no place in `whole`, or several with different shapes.
    """
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    known = {name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(whole)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        return tree
    names = [name(path) for path, _ in leaves]

    def fits(x: Any, shape: tuple[int, ...] | None) -> bool:
        return shape is not None and (count is None or x.shape == _part(shape, count))

    places: set[tuple[Any, ...]] = set()
    for end in known:
        if f"/{end}".endswith(f"/{names[0]}" if names[0] else ""):
            prefix = end.removesuffix(names[0]) if names[0] else f"{end}/"
            found = tuple(known.get((prefix + x).removesuffix("/")) for x in names)
            if all(fits(x, shape) for (_, x), shape in zip(leaves, found, strict=True)):
                places.add(found)
    require(
        len(places) == 1,
        f"Devices hold parts of what the agent learns, and {len(places)} places in it fit the "
        f"leaves {', '.join(names[:3])} of a tree. Pass subtrees of AgentState.params and "
        "AgentState.rest.",
    )
    return jax.tree.unflatten(structure, list(places.pop()))


def _part(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of one device's part of a tensor."""
    axis = _cut(shape, count)
    return tuple(size // count if i == axis else size for i, size in enumerate(shape))


def learned(layout: Layout, whole: AgentState) -> AgentState:
    """Which axes each tensor of what members learn leads with, if devices hold parts of it.

    Args:
      layout: where shards and members lie.
      whole: shapes of what one member learns.
    """

    def leads(x: Any) -> PartitionSpec:
        axis = _cut(x.shape, layout.mesh.shape[DATA])
        return P(MEMBERS) if axis is None else P(MEMBERS, *(None,) * axis, DATA)

    return jax.tree.map(leads, whole)


def _cut(shape: tuple[int, ...], count: int) -> int | None:
    """The axis along which so many devices divide a tensor: the longest possible one, if any."""
    axes = [axis for axis, size in enumerate(shape) if size % count == 0 and size > 0]
    return max(axes, key=lambda axis: shape[axis], default=None)


def spread(
    function: Callable[..., Any], layout: Layout, takes: tuple[Any, ...], gives: Any
) -> Callable[..., Any]:
    """A function of one shard of some members, as one of all shards of all members.

    Args:
      function: it sees one shard, and the members of one device; `shards_of` lets it meet others.
      layout: where shards and members lie.
      takes: for each argument, the axes it leads with; a prefix of its tree.
      gives: the same for the result. Without "shards" it must be the same for all of them.
    """
    if layout.single:
        return function
    if layout.shards > 1:
        mapped = jax.tree.map(lambda spec: 0 if SHARDS in spec else None, (takes, gives))
        if layout.shards_here == 1:
            function = _of_one(function, *mapped)
        else:
            function = jax.vmap(function, *mapped, axis_name=SHARDS, axis_size=layout.shards_here)
    ins, outs = jax.tree.map(lambda spec: _on_mesh(spec, layout), (takes, gives))
    # What leads with no axis is the same on all devices by construction, which is not inferred.
    return jax.shard_map(function, mesh=layout.mesh, in_specs=ins, out_specs=outs, check_vma=False)


def _of_one(function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
    """`jax.vmap` over an axis of one, which is left away: no product then becomes one of many."""

    def at(change: Callable[[Any], Any], axes: Any, tree: Any) -> Any:
        each = lambda axis, x: x if axis is None else jax.tree.map(change, x)  # noqa: E731
        return jax.tree.map(each, axes, tree, is_leaf=lambda axis: axis is None)

    @functools.wraps(function)
    def apply(*args: Any) -> Any:
        return at(lambda x: x[None], gives, function(*at(lambda x: x[0], takes, args)))

    return apply


def placed(like: Any, layout: Layout, leads: Any) -> Any:
    """Shapes that say where their arrays lie.

    Args:
      like: a tree of shapes.
      layout: where shards and members lie.
      leads: the axes they lead with, a prefix of the tree.
    """
    if layout.single:
        return like

    def place(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(layout.mesh, _on_mesh(spec, layout))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return jax.tree.map(place, leads, like)


def _on_mesh(spec: PartitionSpec, layout: Layout) -> PartitionSpec:
    """The axes of the mesh along which an array is divided, given what it leads with."""
    absent = {SHARDS} if layout.shards == 1 else set()
    absent |= {MEMBERS} if layout.members == 1 else set()
    return P(*(DATA if axis == SHARDS else axis for axis in spec if axis not in absent))


def put(tree: Any, layout: Layout, leads: PartitionSpec) -> Any:
    """Keys and arrays on the devices of a layout; all processes have the same."""
    if layout.single:
        return tree
    sharding = NamedSharding(layout.mesh, _on_mesh(leads, layout))

    def place(x: Any) -> Any:
        if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(np.asarray(x), sharding)
        raw = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(raw)

    return jax.tree.map(place, tree)
