"""What a run takes of the device's memory, and what is said of it before it begins."""

import dataclasses
import math

import jax
import pytest

from jaxwm import train
from jaxwm.run import memory
from jaxwm.run.memory import Use
from jaxwm.types import JaxwmError


@pytest.fixture(scope="module")
def program(tiny):
    return train.build(tiny)


def test_the_parts_are_those_of_the_state(tiny, program):
    chunk = program.compile()
    used = memory.estimate(program, chunk, tiny)
    assert used.replay == program.replay.nbytes
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(program.shapes().agent.params))
    critic = program.shapes().agent.params["behavior"]["value"]
    slow = sum(math.prod(x.shape) for x in jax.tree.leaves(critic))
    assert used.parameters == 4 * count
    # Two statistics of each parameter and two counters; the slow critic and its counter; two
    # percentiles; the updates made.
    assert used.optimiser == 4 * (2 * count + 2 + slow + 1 + 2 + 1)
    # The state is all that the program takes and gives, but the two numbers of a chunk.
    found = chunk.function.memory_analysis()
    state = sum(used) - used.activations - used.saving
    assert abs(found.argument_size_in_bytes - state) < 100
    assert used.activations == found.temp_size_in_bytes > 0
    # A save writes half of what 2 * 100 steps of 4 environments are: 50 of 100 rows of each.
    leaves = jax.tree.leaves(program.shapes().buffer.rows)
    rows = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    # On a CPU the larger of those rows and an eighth of the memos is there twice.
    assert used.saving == state - rows // 2 + max(rows // 2, (used.replay - rows) // 8)


def test_members_count_each(tiny, program):
    with jax.debug_key_reuse(False):
        four = train.build(dataclasses.replace(tiny, seeds=2, sweep=("entropy=0,1",)))
        used = memory.estimate(four, four.chunk, tiny)
    assert used.replay == 4 * memory.estimate(program, program.chunk, tiny).replay


def test_a_run_larger_than_the_device_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: 10_000_000_000)
    used = Use(2_000_000_000, 40_000_000, 80_000_000, 8_000_000_000, 1_500, 0)
    told = (
        r"needs 10\.1 GB and the device \(.*\) has 10 GB: activations 8 GB, replay 2 GB, optimiser "
        r"80 MB, parameters 40 MB, environments 1\.5 kB, saving 0 B\. Lower --replay\.batch-size, "
        r"--replay\.batch-length or --size"
    )
    with pytest.raises(JaxwmError, match=told):
        memory.ensure_free(used)
    memory.ensure_free(used._replace(activations=7_000_000_000))


def test_the_line_names_parts_and_flags(monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: 24_000_000_000)
    assert memory.line(Use(5_000_000_000, 4_000, 8_000, 640, 832, 9_000)) == (
        "Memory: replay 5 GB, saving 9 kB, optimiser 8 kB, parameters 4 kB, environments 832 B, "
        "activations 640 B; together 5 GB of 24 GB. Most changed by --replay.capacity, "
        "--replay.context-every or --seeds."
    )


def test_a_full_device_is_told():
    used = Use(5_000_000_000, 4_000, 8_000, 640, 832, 9_000)
    told = (
        r"out of memory: RESOURCE_EXHAUSTED: 9 GiB The run takes replay 5 GB, saving 9 kB.* Lower "
    )
    with pytest.raises(JaxwmError, match=told + r"--replay\.capacity"), memory.in_words(used):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")
    with pytest.raises(JaxwmError, match=r"9 GiB Other .* Lower"), memory.in_words():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.in_words():
        raise jax.errors.JaxRuntimeError("INTERNAL: other")
