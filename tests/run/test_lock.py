"""Of two processes that want the folder of a run, one gets it and the other is told who has it."""

import os
import socket
import subprocess
import sys
import time

import pytest

from jaxwm.run import lock
from jaxwm.types import JaxwmError

HOLDER = """
import pathlib, sys
from jaxwm.run import lock
with lock.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_holds_it(tmp_path):
    run = tmp_path / "new" / "run"
    words = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        host = socket.gethostname()
        told = rf"in use by process {holder.pid} on {host} since 20.*another folder"
        with pytest.raises(JaxwmError, match=told):
            lock.check(run)
        begun = time.monotonic()
        with pytest.raises(JaxwmError, match=told), lock.hold(run):
            pass
        assert time.monotonic() - begun < 5
        holder.kill()
    # However it ends, its lock goes with it.
    lock.check(run)
    with lock.hold(run):
        assert str(os.getpid()) in (run / lock.NAME).read_text()
    with lock.hold(run):
        pass


def test_looking_leaves_nothing_behind(tmp_path):
    lock.check(tmp_path / "nowhere")
    lock.check(tmp_path)
    assert not list(tmp_path.iterdir())


def test_whoever_only_looks_is_waited_for(tmp_path, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(lock, "_take", lambda number: next(answers))
    with lock.hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    told = r"cannot write into .*file.*Give another folder"
    with pytest.raises(JaxwmError, match=told), lock.hold(tmp_path / "file" / "run"):
        pass


def test_a_lock_that_does_not_say_whose_it_is(tmp_path, monkeypatch):
    (tmp_path / lock.NAME).write_text("{")
    monkeypatch.setattr(lock, "_take", lambda number: False)
    with pytest.raises(JaxwmError, match="in use by another process"):
        lock.check(tmp_path)
