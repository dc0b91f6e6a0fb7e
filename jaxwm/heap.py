"""What jaxwm asks of glibc, the C library that hands out memory; others are left alone.

Large pages. A chunk of training takes all its temporary memory anew, in pages of 4 KiB which the
system gives out and looks up one by one. In pages of 2 MiB updates on a CPU take about 5 % less
time. Where the system lends them on request, glibc asks for them if it was told to as the process
began.

Memory that was freed. glibc takes memory from the system for every few threads apart, and keeps up
to 64 MiB that they have freed for what they ask for next. A save asks for copies of whole arrays in
threads of XLA and Orbax, each time in other ones, so a process would grow for hours.

Source: `man 3 mallopt`, `man 3 malloc_trim`; glibc's manual, "Memory Allocation Tunables".
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 1 << 20, 8 << 20


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose memory comes in large pages, where that is possible."""
    told = environment.get("GLIBC_TUNABLES", "")
    try:
        lent = "[madvise]" in LARGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        lent = False
    if not lent or "glibc.malloc.hugetlb" in told:
        return dict(environment)
    told = ":".join(filter(None, [told, "glibc.malloc.hugetlb=1"]))
    return {**environment, "GLIBC_TUNABLES": told}


def ask_for_large_pages() -> None:
    """Starts this program anew, as the same process, if its memory could come in large pages."""
    environment = with_large_pages(os.environ)
    if environment != dict(os.environ) and not sys.gettrace():  # a debugger would lose it
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, environment)


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
