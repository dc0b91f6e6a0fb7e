"""Signals that ask a run to stop: the first is remembered, a second one acts at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Where there is such a signal, and it is not ignored, as under nohup: the terminal is closed.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS = (*SIGNALS, signal.SIGHUP)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ends the process at a signal, with the exit code 128 + its number, while the body runs.

    Not even a long compilation, which Python's own handlers wait for, puts it off. Only the first
    thread can have this; for others nothing changes.
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
    try:
        with _handled(lambda number, frame: None, sink):
            yield
    finally:
        os.close(sink)


@contextlib.contextmanager
def asked() -> Iterator[list[int]]:
    """The signals received so far, while the body runs; in other threads than the first, none.

    A notebook's interrupt is a SIGINT too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    with contextlib.ExitStack() as handling:

        def note(number: int, frame: Any) -> None:
            received.append(number)
            handling.close()  # whoever asks twice wants it now

        handling.enter_context(_handled(note))
        yield received


@contextlib.contextmanager
def _handled(handler: Any, sink: int = -1) -> Iterator[None]:
    """Lets a function handle the signals, and their numbers be written to a pipe at once."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    wake = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number, old in before.items():
            signal.signal(number, old)


def leave(number: int) -> None:
    """Ends as the signal asks: an interrupt, or the exit code 128 + its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def name(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name
