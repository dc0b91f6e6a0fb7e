"""What jaxwm asks of glibc, the C library that hands out memory; others are left alone.

Large pages. The system gives out and looks up memory in pages of 4 KiB, one by one. In pages of 2
MiB the fastest updates on a CPU take 6 % less time. Where the system lends them on request, glibc
asks for them if it was told to as the process began.

Temporary memory. Every run of a program takes its temporary memory anew, and frees it. What the
system gets back, it gives out again page by page and filled with zeros; a virtual machine may have
given it away meanwhile, and an update that follows three seconds of rest takes 1.4 times as long.
glibc can keep what is freed, but only in pieces that fit into its heaps.

Copies. A save asks for copies of whole arrays in threads of XLA and Orbax, each time in other ones,
and glibc has heaps for every few threads apart, so a process that keeps these would grow for hours.

Source: `man 3 mallopt`, `man 3 malloc_trim`; glibc's manual, "Memory Allocation Tunables".
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A heap of any thread but the first has 64 MiB, the bookkeeping included.
HEAP = 64 << 20
PIECE = 56 << 20
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SMALL, _MOST = 1 << 20, 2**31 - 1


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


def keep() -> None:
    """From now on pieces of up to `PIECE` bytes stay with the process when they are freed."""
    _call("mallopt", _MMAP_THRESHOLD, HEAP)
    _call("mallopt", _TRIM_THRESHOLD, _MOST)
    _call("mallopt", _TOP_PAD, HEAP)  # or an empty heap goes back whole


def borrow() -> None:
    """Until `give_back`, pieces of 1 MiB and more go back as soon as they are freed."""
    for threshold in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
        _call("mallopt", threshold, _SMALL)


def give_back() -> None:
    """Ends `borrow`: gives back what is free, and keeps what is freed from now on."""
    _call("malloc_trim", 0)
    keep()


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no such function
        getattr(ctypes.CDLL(None), name)(*arguments)
