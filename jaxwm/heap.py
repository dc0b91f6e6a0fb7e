"""Memory that was freed, and that the C library would keep.

glibc takes memory from the system for every thread apart, and keeps up to 64 MiB that a thread has
freed for what it asks for next. Threads of Orbax ask for copies of whole arrays at every save, each
time other ones, so a process would grow for hours. Other C libraries are left alone.

Source: `man 3 mallopt`, `man 3 malloc_trim`.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SMALL, _LARGEST = 1 << 20, 32 << 20


def borrow() -> None:
    """Until `give_back`, what is asked for in pieces of 1 MiB and more goes back when it is freed."""
    _call("mallopt", _MMAP_THRESHOLD, _SMALL)


def give_back() -> None:
    """Ends `borrow`, and gives back what else is free."""
    # What glibc comes to by itself, once a piece of that size was freed.
    _call("mallopt", _MMAP_THRESHOLD, _LARGEST)
    _call("mallopt", _TRIM_THRESHOLD, 2 * _LARGEST)
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no such function
        getattr(ctypes.CDLL(None), name)(*arguments)
