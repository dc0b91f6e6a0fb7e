"""The metrics file, the console line and TensorBoard."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxwm.run import log
from jaxwm.run.log import Logger, read_metrics
from jaxwm.types import JaxwmError


class Clock:
    """Seconds set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_one_strict_line_per_seed(tmp_path):
    clock = Clock()
    with Logger(tmp_path / "run", 100, seeds=2, console=plain(), clock=clock) as logger:
        clock.now += 1.5
        returns = np.array([23.123456789, np.nan], np.float32)
        size = np.array([7, 8], np.int32)
        logger.write(10, 3, {"episode/return": returns, "replay/size": size, "grad_norm": np.inf})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    # 23.123456789 to six significant digits; NaN and infinity are left out.
    assert text == (
        '{"step": 10, "updates": 3, "seed": 0, "time": 1.5, "episode/return": 23.1235, '
        '"replay/size": 7}\n'
        '{"step": 10, "updates": 3, "seed": 1, "time": 1.5, "replay/size": 8}\n'
    )


def test_every_write_is_readable_at_once(tmp_path):
    with Logger(tmp_path, 100, console=plain()) as logger:
        for step in (np.int64(1), 2):
            logger.write(step, step, {"loss/total": 0.5})
            assert read_metrics(tmp_path)[-1]["step"] == step


def test_a_half_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_before_the_last_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(JaxwmError, match=r"line 2, is not JSON"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_told(tmp_path):
    with pytest.raises(JaxwmError, match=r"is not the folder of a run: it has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_resume_leaves_neither_gap_nor_duplicate(tmp_path):
    clock = Clock()
    with Logger(tmp_path, 50, seeds=2, console=plain(), clock=clock) as logger:
        for step in (10, 20, 30):
            clock.now += 1
            logger.write(step, step, {"loss/total": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "upd')  # killed in the middle of a write
    clock.now += 1000
    with Logger(tmp_path, 50, 2, console=plain(), resume_step=20, clock=clock) as logger:
        assert [line["step"] for line in read_metrics(tmp_path)] == [10, 10, 20, 20]
        for step in (30, 40, 50):
            clock.now += 1
            logger.write(step, step, {"loss/total": step})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines[::2]] == [10, 20, 30, 40, 50]
    # The clock of training stood still between the two: 1 s per write.
    assert [line["time"] for line in lines[1::2]] == [1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_resume_without_metrics_starts_them(tmp_path):
    with Logger(tmp_path, 50, console=plain(), resume_step=20) as logger:
        logger.write(30, 1, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [30]


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(JaxwmError, match="already holds the metrics of a run"):
        Logger(tmp_path, 50, console=plain())


def test_a_metric_of_a_wrong_shape_is_told(tmp_path):
    with (
        Logger(tmp_path, 50, seeds=2, console=plain()) as logger,
        pytest.raises(JaxwmError, match=r"'loss/total' has shape \(3,\).*shape \(2,\)"),
    ):
        logger.write(1, 1, {"loss/total": np.zeros(3)})


def test_plain_lines_every_few_seconds_and_the_last(tmp_path):
    clock, console = Clock(), plain()
    nothing = np.full(2, np.nan)
    with Logger(tmp_path, 30_000, seeds=2, console=console, clock=clock) as logger:
        for second in range(5):
            clock.now = 100.0 + second
            ended = np.array([20.0, 26.2]) if second == 2 else nothing
            metrics = {"episode/return": ended, "loss/total": np.array([8.0, 8.26])}
            logger.write(1000 + 1234 * second, 100 + 40 * second, metrics)
    # Lines at 0 s and 3 s, and the one of 4 s at the end. The mean return is that of the last
    # ended episodes, (20 + 26.2) / 2. At 3 s, 30,000 - 4,702 = 25,298 steps take 20.5 s.
    assert console.file.getvalue().splitlines() == [
        "step 1,000/30,000  updates 100  loss 8.13",
        "step 4,702/30,000  updates 220  return 23.1  loss 8.13  1,234 steps/s  40.0 updates/s"
        "  eta 0:21",
        "step 5,936/30,000  updates 260  return 23.1  loss 8.13  1,234 steps/s  40.0 updates/s"
        "  eta 0:20",
    ]


def test_a_last_line_already_told_is_not_told_again(tmp_path):
    console = plain()
    with Logger(tmp_path, 10, console=console) as logger:
        logger.write(10, 1, {})
    assert console.file.getvalue() == "step 10/10  updates 1\n"


def test_a_terminal_shows_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Logger(tmp_path, 100, console=console) as logger:
        logger.write(50, 5, {"episode/return": 12.5})
    shown = console.file.getvalue()
    assert "━" in shown
    assert "step 50/100  updates 5  return 12.5" in shown


def test_tensorboard_has_a_tag_per_seed(tmp_path, monkeypatch):
    written = []

    class Board:
        def add_scalar(self, *arguments):
            written.append(arguments)

        def flush(self):
            written.append("flush")

        def close(self):
            written.append("close")

    monkeypatch.setattr(log, "_board", lambda folder: Board())
    with Logger(tmp_path, 100, seeds=2, tensorboard=True, console=plain()) as logger:
        logger.write(5, 1, {"episode/return": np.array([np.nan, 2.0])})
    assert written == [("episode/return/seed_1", 2.0, 5), "flush", "close"]


def test_tensorboard_writes_event_files(tmp_path):
    with Logger(tmp_path, 100, tensorboard=True, console=plain()) as logger:
        logger.write(5, 1, {"loss/total": 2.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss/total" in events.read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.4, "1,234"), (40.24, "40.2"), (8.126, "8.13"), (-0.01234, "-0.0123"), (0, "0.0")],
)
def test_short_numbers(value, text):
    assert log._short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "0:10"), (80, "1:20"), (7280, "2:01:20")])
def test_durations(seconds, text):
    assert log._duration(seconds) == text


def test_lines_are_strict_json(tmp_path):
    def refuse(word):
        raise AssertionError(word)

    with Logger(tmp_path, 10, console=plain()) as logger:
        logger.write(1, 1, {"a": np.nan, "b": -np.inf, "c": np.float32(1e30), "d": True})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == line | {"c": 1e30, "d": 1}
    assert not {"a", "b"} & set(line)


class Full:
    """A file on a disk that takes so many bytes more, and then no more."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        done = self._file.write(data[: self.room])
        self.room -= done
        return done

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_what_a_full_disk_does_not_take_is_written_later_and_never_in_part(tmp_path):
    console = plain()
    with Logger(tmp_path, 100, console=console) as logger:
        logger.write(1, 1, {"loss/total": 0.5})
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        logger._file = full = Full(logger._file, 30)
        for step in (2, 3):
            logger.write(step, step, {"loss/total": 0.5})
            assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        assert not logger.flush()
        full.room = 10_000
        logger.write(4, 4, {"loss/total": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert "lines are kept for later" in " ".join(console.file.getvalue().split())


def test_a_run_that_goes_back_drops_the_lines_after(tmp_path):
    with Logger(tmp_path, 100, console=plain()) as logger:
        for step in (1, 2, 3):
            logger.write(step, step, {})
        logger.rewind(1)
        logger.write(2, 2, {"again": 1})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["again"] == 1
