"""A first signal is remembered where a run can be saved; anywhere else it ends the process."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxwm.run import stop

# This does not let Python's own handlers run for minutes, as a long compilation does not.
DEAF = """
import hashlib
from jaxwm.run import stop
with stop.at_once():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
"""
# The first is remembered, the second one ends it.
ASKED = """
import time
from jaxwm.run import stop
with stop.at_once(), stop.asked() as received:
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    print(received[0], flush=True)
    time.sleep(60)
"""


# A command is done, and what was registered for the exit takes its time; then the signals are deaf.
DONE = """
import atexit, time
from jaxwm.run import stop
with stop.at_once(to_the_end=True):
    pass
atexit.register(lambda: (print("ready", flush=True), time.sleep({seconds})))
"""


def started(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_where_nothing_can_be_saved_a_signal_ends_the_process(number, code):
    with started(DEAF) as process:
        process.send_signal(number)
        assert process.wait(10) == code


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_the_first_is_remembered_and_the_second_ends_the_process(number):
    with started(ASKED) as process:
        process.send_signal(number)
        assert process.stdout and int(process.stdout.readline()) == number
        process.send_signal(number)
        assert process.wait(10) == 128 + number


def test_a_signal_after_the_end_of_a_command_is_answered_in_the_same_way():
    with started(DONE.format(seconds=60)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143


def test_the_end_of_the_interpreter_fails_at_no_signal():
    last = "import atexit, time\nprint('ready', flush=True)\n"
    last += "atexit.register(lambda: time.sleep(2))\n"  # it runs after what is registered later
    with started(last + DONE.format(seconds=0).replace("print(", "id(")) as process:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.at_once(), stop.asked() as received:
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_receive_none():
    found = []

    def other() -> None:
        with stop.at_once(), stop.asked() as received:
            found.append(received)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [[]]


def test_leaving():
    with pytest.raises(KeyboardInterrupt):
        stop.leave(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        stop.leave(signal.SIGTERM)
    assert end.value.code == 143
    assert stop.name(signal.SIGTERM) == "SIGTERM"
