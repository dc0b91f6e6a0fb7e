"""Memory that was freed, and that the C library would keep.

glibc takes memory from the system for every few threads apart, and keeps up to 64 MiB that they
have freed for what they ask for next. A save asks for copies of whole arrays in threads of XLA and
Orbax, each time in other ones, so a process would grow for hours. Other C libraries are left alone.

Source: `man 3 mallopt`, `man 3 malloc_trim`.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 1 << 20, 8 << 20


def borrow() -> None:
    """Until `give_back`, pieces of 1 MiB and more go back as soon as they are freed."""
    _call("mallopt", _MMAP_THRESHOLD, _SMALL)
    _call("mallopt", _TRIM_THRESHOLD, _SMALL)


def give_back() -> None:
    """Ends `borrow`, and gives back what else is free."""
    # By itself glibc comes to four times as much; then what a program takes between two lines of
    # metrics stays now with one thread and now with another.
    _call("mallopt", _MMAP_THRESHOLD, _LARGE)
    _call("mallopt", _TRIM_THRESHOLD, 2 * _LARGE)
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no such function
        getattr(ctypes.CDLL(None), name)(*arguments)
