"""Signals that ask a run to stop: the first is remembered, a second one acts at once."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Where there is such a signal, and it is not ignored, as under nohup: the terminal is closed.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS = (*SIGNALS, signal.SIGHUP)


@contextlib.contextmanager
def at_once(to_the_end: bool = False) -> Iterator[None]:
    """Ends the process at a signal, with the exit code 128 + its number, while the body runs.

    Not even a long compilation, which Python's own handlers wait for, puts it off. Only the first
    thread can have this; for others nothing changes.

    Args:
      to_the_end: whether the process ends after the body. It goes on then to answer in this way
        until the interpreter is taken down, which nothing can hurry and no signal should fail.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def listen() -> None:
        while number := os.read(source, 1):
            if number[0] in SIGNALS:
                with contextlib.suppress(OSError, ValueError):
                    print(f"jaxwm: ended by {name(number[0])}", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
        os.close(source)

    threading.Thread(target=listen, daemon=True).start()
    put_back = _handle(lambda number, frame: None, sink)
    if to_the_end:
        atexit.register(_ignore)
    try:
        yield
    finally:
        if not to_the_end:
            put_back()
            os.close(sink)


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def asked() -> Iterator[list[int]]:
    """The signals received so far, while the body runs; in other threads than the first, none.

    A notebook's interrupt is a SIGINT too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        put_back()  # whoever asks twice wants it now

    put_back = _handle(note)
    try:
        yield received
    finally:
        put_back()


def _handle(handler: Any, sink: int = -1) -> Callable[[], None]:
    """Lets a function handle the signals, and their numbers be written to a pipe at once.

    Returns:
      What puts the handlers and the pipe back that were there before.
    """
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    wake = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)

    def put_back() -> None:
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number, old in before.items():
            signal.signal(number, old)

    return put_back


def leave(number: int) -> None:
    """Ends as the signal asks: an interrupt, or the exit code 128 + its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def name(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name
