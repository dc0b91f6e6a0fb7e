"""Cores as devices, in processes of their own: jax asks for them once. The rest: multi_device."""

import subprocess
import sys

import pytest

COUNT = """
import dataclasses
from jaxwm.train import mesh
from jaxwm.recipes import dreamer_v3

mesh.cores = lambda: 6
config = dreamer_v3.config("toy/Memory", "debug")
changed = dataclasses.replace(config, envs=8, seeds={seeds}, shards={shards})
before = {before}
mesh.use_cores(changed)
import jax

print(jax.device_count(), mesh.layout(changed).sharing)
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
