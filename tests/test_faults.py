"""The short version of what `tests/faults` does to runs, in their processes and on their disks."""

import jax
import pytest

from tests.faults import changed, corrupt, cuts, damage, disk, diverge, kill, races, signals


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    line = kill.measure(4, 1, tmp_path)
    assert line["broken"] == [] and line["kills"] == 4


@pytest.mark.slow
def test_signals_save_and_lose_nothing(tmp_path):
    line = signals.measure(3, 0, tmp_path)
    assert line["broken"] == [] and line["signals"] == 3


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    try:
        line = disk.measure(1, 0, tmp_path)
    except SystemExit as end:  # nothing can be mounted here
        pytest.skip(str(end))
    assert line["broken"] == []


@pytest.mark.slow
def test_one_of_two_gets_the_folder(tmp_path):
    line = races.measure(3, 0, tmp_path, reals=1)
    assert line["broken"] == [] and line["held"] == 2 and line["two_trains"] == 1


def test_nothing_damaged_is_taken_for_what_was_saved(finished, tiny, tmp_path):
    run = corrupt.Run(damage.copy(finished, tmp_path / "run"), tiny)
    line = corrupt.measure(30, 0, tmp_path, run)
    assert line["broken"] == []


def test_no_checkpoint_is_ever_not_finite(tmp_path):
    with jax.debug_key_reuse(False):
        line = diverge.measure(1, 0, tmp_path, ("rollback",), alone=False)
    assert line["broken"] == []


def test_configurations_that_cannot_be_are_refused(finished, tmp_path):
    line = changed.measure(20, 0, tmp_path, changes=5, run=finished)
    assert line["broken"] == []


@pytest.mark.slow
def test_a_cut_changes_no_bit(tmp_path):
    with jax.debug_key_reuse(False):
        line = cuts.measure(1, 0, tmp_path)
    assert line["broken"] == []
