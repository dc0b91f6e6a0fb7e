"""Signals that ask a run to stop: the first is remembered, a second one acts at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def asked() -> Iterator[list[int]]:
    """The signals received so far, while the body runs; in other threads than the first, none.

    A notebook's interrupt is a SIGINT too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()  # whoever asks twice wants it now

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        before.update({number: signal.signal(number, note) for number in SIGNALS})
        yield received
    finally:
        restore()


def leave(number: int) -> None:
    """Ends as the signal asks: an interrupt, or the exit code 128 + its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def name(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name
