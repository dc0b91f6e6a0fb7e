"""One process at a time writes into the folder of a run.

The lock is the operating system's (`flock`), so it goes with the process that held it, however that
ended; what the file says is for people. Where there is no such lock, two runs are not kept apart.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxwm.spaces import JaxwmError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "lock"
_PATIENCE = 0.3  # seconds


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which is made if it is not there.

    Raises:
      JaxwmError: if another process holds it, or nothing can be written there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = _open(run / NAME, os.O_CREAT | os.O_RDWR | os.O_APPEND, "a+")
    except OSError as error:
        raise JaxwmError(
            f"The run cannot write into {run} ({error.strerror}). Give another folder with --run."
        ) from None
    with file:
        # Whoever only looks holds it for a moment, and whoever has just got it writes its name.
        until = time.monotonic() + _PATIENCE
        while not _take(file.fileno()):
            if time.monotonic() > until:
                file.seek(0)
                raise _taken(run, file.read())
            time.sleep(0.02)
        # Only for people to read, so never in the way of the run.
        with contextlib.suppress(OSError):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{json.dumps(about)}\n".encode())
        yield


def check(run: Path) -> None:
    """Raises an error if a process holds the lock of a run's folder; changes nothing."""
    try:
        file = _open(run / NAME, os.O_RDONLY, "r")
    except OSError:
        return
    with file:
        if not _take(file.fileno()):
            raise _taken(run, file.read())


def _open(path: Path, flags: int, mode: str) -> IO[str]:
    """The file of a lock: never what a link leads to, nor the end of a pipe."""
    number = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    return open(number, mode, encoding="utf-8")


def _take(number: int) -> bool:
    """Whether the lock of an open file is had now; closing the file gives it back."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _taken(run: Path, text: str) -> JaxwmError:
    try:
        found = json.loads(text)
        who = f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        who = "another process"
    return JaxwmError(
        f"{run} is in use by {who}. Wait for its end, stop it, or give another folder with --run."
    )
