"""Many devices: which holds what of a run, and what they tell each other.

Environments, replay and batch of a member are divided into shards. A shard is the training of one
device in small: its environments fill its replay, from which it samples its part of every batch.
Experience never leaves it. What shards share is told by `Shards`: the gradient with the metrics of
an update (one all-reduce of as many bytes), the returns of the dreams, of which the percentiles are
taken (`imagine * batch_length * batch_size` float32 numbers, 60 KiB by default), and once in a
chunk the sums over ended episodes.

The devices form a mesh with the axes "members" and "data". Each device holds some of the members,
and some of the shards of those. A device's members and shards are mapped by `jax.vmap`, the devices
by `jax.shard_map`; so shards meet over two axes, "shards" within a device and "data" across them.
How many devices there are decides nothing but where things lie: the numbers are the same to
rounding, until a class that is sampled comes out differently for it.

Which axes an array leads with is said by a `PartitionSpec` of "shards" and "members", of which a
layout drops what it has but one of.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxwm.agent import AgentState
from jaxwm.config import require, to_dict
from jaxwm.envs.host import cores
from jaxwm.numerics import fold_mirrored, unfold_mirrored
from jaxwm.recipes import RunConfig
from jaxwm.types import ALONE, JaxwmError, Shards

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
        """Devices that share one memory: those in use, if they are the cores of a CPU."""
        devices = self.mesh.local_devices
        return len(devices) if devices[0].platform == "cpu" else 1

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
    """Among how many of so many devices shards and members are divided."""
    data = math.gcd(count, config.shards)
    return data, math.gcd(count // data, config.members)


def use_cores(config: RunConfig) -> None:
    """Makes devices of a CPU's cores, as many as shards and members can be divided among.

    A device on each core is busier than one device that hands out parts of every operation: small
    ones are not worth dividing. Call it before jax is used. Where that is too late, or something
    else says how many devices a CPU is, or processes train together, it changes nothing.
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
      whole: shapes of what one member learns, if devices hold but parts of it. A pair of bins may
        then lie on two devices, so that means are rounded as the order of adding up has it.
    """
    if layout.shards == 1:
        return ALONE
    here = (SHARDS,) * (layout.shards_here > 1)
    across = (DATA, *here)

    def all_gather(x: Any) -> Any:
        for axis in reversed(across):
            x = jax.lax.all_gather(x, axis)
        return x

    def mean_in_any_order(tree: Any) -> Any:
        return _at_bins(unfold_mirrored, _pmean(_at_bins(fold_mirrored, tree), across))

    shards = Shards(
        own=lambda key: jax.random.fold_in(key, jax.lax.axis_index(across)),
        mean=mean_in_any_order,
        total=lambda tree: jax.lax.psum(tree, across),
        all_gather=all_gather,
    )
    if whole is None:
        return shards
    count = layout.mesh.shape[DATA]

    def own_slice(x: Any) -> Any:
        axis = _cut(x.shape, count)
        if axis is None:
            return x
        size = x.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DATA) * size, size, axis)

    def join(x: Any, like: Any) -> Any:
        axis = _cut(like.shape, count)
        return x if axis is None else jax.lax.all_gather(x, DATA, axis=axis, tiled=True)

    def mean(x: Any) -> Any:
        x, axis = jax.lax.pmean(x, here), _cut(x.shape, count)
        if axis is None:
            return jax.lax.pmean(x, DATA)
        return jax.lax.psum_scatter(x, DATA, scatter_dimension=axis, tiled=True) / count

    def total(number: Any, like: Any) -> Any:
        return number if _cut(like.shape, count) is None else jax.lax.psum(number, DATA)

    return shards._replace(
        mean=lambda tree: jax.tree.map(mean, tree),
        slice=lambda state: jax.tree.map(own_slice, state),
        gather_params=lambda tree: jax.tree.map(join, tree, whole.params),
        gather_slow=lambda tree: jax.tree.map(join, tree, whole.slow.params),
        sum_parts=lambda numbers: jax.tree.map(total, numbers, whole.params),
    )


def _pmean(tree: Any, axes: tuple[str, ...]) -> Any:
    if jax.default_backend() != "cpu":
        return jax.lax.pmean(tree, axes)
    # Arrays as one: on a CPU the devices meet for each, and a hundred times that takes longer than
    # to add up a million numbers. Of single numbers XLA sees which all devices know already.
    leaves, structure = jax.tree.flatten(tree)
    flat, restore = ravel_pytree([x for x in leaves if x.ndim])
    flat, numbers = jax.lax.pmean((flat, [x for x in leaves if not x.ndim]), axes)
    arrays, numbers = iter(restore(flat)), iter(numbers)
    means = [next(arrays if x.ndim else numbers) for x in leaves]
    return jax.tree.unflatten(structure, means)


def _at_bins(function: Callable[[Any], Any], tree: Any) -> Any:
    """A function of those gradients that belong to the logits of two-hot bins.

    Devices that pass sums on in a ring add up every part of a tensor in another order, and bins
    of 5e8 would make values of the last bits by which pairs of gradients then differ.
    """

    def leaf(path: Any, x: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        return function(x) if re.search("(model/reward|behavior/value)/out/", names) else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


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


def fetch(tree: Any) -> Any:
    """Arrays from wherever they lie to numpy, whole; all processes must ask for the same."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def agree(number: int) -> int:
    """What the first process says, whose clock may differ from those of others."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def most(number: int) -> int:
    """The largest of what all processes say, such as a signal that one of them was sent."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_same(config: RunConfig) -> None:
    """Refuses to train in processes that were told different things.

    Raises:
      JaxwmError: in every process, with the number of the first that differs from process 0.
    """
    if jax.process_count() == 1:
        return
    whole = json.dumps(to_dict(config), sort_keys=True).encode()
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(whole)))
    other = int(np.argmax(sums != sums[0]))
    require(
        other == 0,
        f"Process {other} was started with other settings than process 0. Start all with the same "
        "command, but for --process.",
    )


def wait(name: str) -> None:
    """Waits until all processes have come to the point `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of several that train together; call it before jax is used.

    SLURM, Open MPI, Kubernetes and Cloud TPU say by themselves who takes part; elsewhere every
    process must be told.

    Args:
      coordinator: "HOST:PORT" of process 0, where all others can reach it.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      JaxwmError: if nothing says who takes part. If the others do not come, jax ends the process.
    """
    port = re.fullmatch(r".+:(\d+)", "any:1" if coordinator is None else coordinator)
    require(
        port is not None and 0 < int(port[1]) < 2**16,
        f"The coordinator is {coordinator!r}; it should be HOST:PORT, the port 1 to 65535.",
    )
    print("Waiting for the other processes, five minutes at most.", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise JaxwmError(
            f"This process cannot join others ({str(error).splitlines()[0]}). Outside of SLURM, "
            "Open MPI, Kubernetes and Cloud TPU give each process --coordinator HOST:PORT, "
            "--processes COUNT and --process NUMBER (from 0)."
        ) from error
