"""Where a run lies on devices. What shards compute together is in multi_device.

Cores become devices in processes of their own: jax asks for them once.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxwm import train
from jaxwm.envs import wrappers
from jaxwm.train import mesh
from jaxwm.types import JaxwmError
from tests.train.fake import run_config

COUNT = """
from jaxwm.train import mesh
from tests.train.fake import registered, run_config

mesh.cores = lambda: 6
with registered():
    config = run_config(envs=8, batch_size=4, seeds={seeds}, shards={shards})
before = {before}
mesh.use_cores(config)
import jax

print(jax.device_count(), mesh.layout(config).sharing)
"""


@pytest.mark.parametrize(
    ("seeds", "shards", "before", "devices", "used"),
    [
        (1, 1, None, 1, 1),
        (8, 1, None, 4, 4),  # not six: four hold as many
        (3, 2, None, 6, 6),
        (1, 4, None, 4, 4),
        (8, 1, "__import__('jax').devices()", 1, 1),  # jax has been used
        (8, 1, "__import__('jax').config.update('jax_num_cpu_devices', 3)", 3, 1),
    ],
)
def test_as_many_cores_are_devices_as_hold_seeds_and_shards(seeds, shards, before, devices, used):
    code = COUNT.format(seeds=seeds, shards=shards, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(devices), str(used)]


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


WHOLE = {
    "model": {"core": {"kernel": shaped(16, 4), "bias": shaped(4)}},
    "behavior": {"policy": {"kernel": shaped(4, 24)}, "slow": {"kernel": shaped(3, 5)}},
}


def test_each_part_of_a_tree_finds_its_whole_shapes():
    everything = {
        "model": {"core": {"kernel": (16, 4), "bias": (4,)}},
        "behavior": {"policy": {"kernel": (4, 24)}, "slow": {"kernel": (3, 5)}},
    }
    numbers = jax.tree.map(lambda _: 0.0, WHOLE)
    assert mesh.shapes_in(numbers, WHOLE) == everything
    # Subtrees, flat dicts by path as optimisers of groups see them, single leaves, nothing.
    assert mesh.shapes_in(numbers["model"], WHOLE) == everything["model"]
    assert mesh.shapes_in(numbers["model"]["core"], WHOLE) == everything["model"]["core"]
    flat = {"behavior/policy/kernel": 0.0, "model/core/bias": 0.0}
    assert mesh.shapes_in(flat, WHOLE) == {
        "behavior/policy/kernel": (4, 24),
        "model/core/bias": (4,),
    }
    assert mesh.shapes_in((), WHOLE) == ()
    # A device's part says which of several places is meant: 16 / 8, 24 / 8, and 3, undivided.
    for part, whole in [((2, 4), (16, 4)), ((4, 3), (4, 24)), ((3, 5), (3, 5))]:
        assert mesh.shapes_in({"kernel": shaped(*part)}, WHOLE, 8) == {"kernel": whole}


@pytest.mark.parametrize("tree", [{"kernel": 0.0}, {"nowhere": 0.0}, {"core": {"scale": 0.0}}])
def test_a_tree_without_a_place_of_its_own_is_refused(tree):
    with pytest.raises(JaxwmError, match=r"places in it fit the leaves .* Pass subtrees of Agent"):
        mesh.shapes_in(tree, WHOLE)


def test_a_shard_is_a_run_in_small():
    config = run_config(shards=2, prefill=41)
    small = mesh.shard_config(config)
    assert (small.envs, small.shards, small.replay.capacity, small.replay.batch_size) == (
        2,
        1,
        200,
        1,
    )
    assert mesh.layout(config).shards == 2 and mesh.layout(config).single is False
    program = train.build(config)
    assert program.shapes().buffer.rows.reward.shape == (2, 2, 100)


def test_the_first_fault_of_the_shards_is_reported():
    count, key, env = [[0, 2], [3, 0]], [[-1, 1], [0, -1]], [[-1, 0], [1, -1]]  # shard by seed
    fault = wrappers.Fault(np.array(count), np.array(key), np.array(env))
    found = wrappers.first_fault(fault, 4)
    # The first seed's fault is in environment 1 of the second shard, the other's in the first.
    assert [x.tolist() for x in found] == [[3, 2], [0, 1], [5, 0]]
