"""The short version of what `tests/faults` does to real runs in processes of their own."""

import pytest

from tests.faults import kill, signals


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    line = kill.measure(4, 1, tmp_path)
    assert line["broken"] == [] and line["kills"] == 4


@pytest.mark.slow
def test_signals_save_and_lose_nothing(tmp_path):
    line = signals.measure(3, 0, tmp_path)
    assert line["broken"] == [] and line["signals"] == 3
