"""One training on any number of devices and processes; see `driver.py`, which trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("devices")  # they share what one training found
DRIVER = Path(__file__).with_name("driver.py")
COUNTS = ("1", "2", "4", "8")


def start(devices: int, *words: str) -> subprocess.Popen:
    """The driver on so many fake devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    root = str(DRIVER.parents[2])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}
    command = [sys.executable, str(DRIVER), *words]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> dict:
    """What the driver found."""
    try:
        out, error = process.communicate(timeout=550)
    finally:
        process.kill()
    assert process.returncode == 0, error[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return result(start(8, "counts", str(tmp_path_factory.mktemp("counts"))))


@pytest.mark.parametrize("count", COUNTS)
def test_a_hundred_updates_are_the_same_on_any_number_of_devices(counts, count):
    found = counts["training"][count]
    assert found["devices"] == int(count) and found["updates"] == 101
    assert counts["begun"] and counts["moved"] > 1e-3
    # Parameters, slow critic and percentiles; then losses and all other metrics.
    assert found["learned"] < 1e-5
    assert found["told"] < 1e-5


@pytest.mark.parametrize("count", COUNTS[1:])
def test_an_update_reduces_one_gradient_and_moves_no_experience(counts, count):
    traffic = counts["training"][count]["traffic"]
    # Episodes are counted once in a chunk. The norm is that of the mean gradient, and the scale of
    # the returns that of all returns: all shards know both.
    told = {x for x in counts["metrics"] if not x.startswith("episode/")}
    reduced = told - {"grad_norm", "dream/return_scale", "updates/refused"}
    update = sorted((x["kind"], x["bytes"]) for x in traffic if x["depth"] == 2)
    assert update == [
        ("all-gather", 4 * counts["returns"]),
        ("all-reduce", 4 * (counts["parameters"] + len(reduced))),
    ]
    # Number, returns and lengths of the episodes that ended.
    assert [x for x in traffic if x["depth"] != 2] == [
        {"kind": "all-reduce", "bytes": 12, "depth": 0}
    ]


@pytest.mark.parametrize("here", COUNTS)
@pytest.mark.parametrize("there", COUNTS)
def test_a_checkpoint_is_restored_on_any_number_of_devices(counts, there, here):
    found = counts["restored"][f"{there} to {here}"]
    assert found["same"]
    assert found["updates"] == 101 + 27
    assert found["learned"] < 1e-5


def test_parameters_in_parts_learn_the_same(counts):
    found = counts["parts"]
    assert found["learned"] < 1e-5 and found["told"] < 1e-5
    assert found["same"]
    # Nearly all tensors have an axis that eight devices can divide.
    assert 1 / 8 <= found["held"] < 1 / 4


def test_seeds_lie_on_devices_too():
    found = result(start(8, "seeds"))
    assert found["meshes"] == [{"members": 2, "data": 2}, {"members": 1, "data": 1}]
    assert found["apart"] < 1e-5
    assert found["same"]


def test_two_processes_train_as_one(counts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start(4, "process", str(number), address) for number in range(2)]
    one, other = map(result, both)
    assert one == other
    assert (one["devices"], one["here"]) == (8, 4)
    assert one["refused"].startswith("Process 1 was started with other settings than process 0.")
    assert one["most"] == 15
    assert abs(one["loss"] - counts["training"]["8"]["loss"]) < 1e-5
