"""What jaxwm asks of glibc."""

import ctypes
import os
import subprocess
import sys

import pytest

from jaxwm import heap

# Eight threads take 40 MB each, twice, and free it: by itself glibc would keep none of it.
SCRIPT = """
import sys, threading
import numpy as np
from jaxwm import heap
from jaxwm.envs.host import resident_bytes

def work():
    for _ in range(2):
        both.wait()
        block = np.ones(40 << 20, np.uint8)
        both.wait()
        del block

both = threading.Barrier(8)
before = resident_bytes()
if sys.argv[1] != "nothing":
    heap.keep()
if sys.argv[1] == "borrow":
    heap.borrow()
threads = [threading.Thread(target=work) for _ in range(8)]
[x.start() for x in threads]
[x.join() for x in threads]
if sys.argv[1] == "borrow":
    heap.give_back()
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is not glibc")
def test_what_threads_freed_is_kept_or_goes_back():
    def kept(how: str) -> int:
        words = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert max(kept("nothing"), kept("borrow")) < 20 << 20
    assert kept("keep") > 300 << 20


@pytest.mark.parametrize(
    ("lent", "told", "wanted"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.a=1", "glibc.a=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_large_pages_are_asked_for_where_they_are_lent(lent, told, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(heap, "LARGE_PAGES", tmp_path / "enabled")
    if lent is not None:
        heap.LARGE_PAGES.write_text(lent)
    before = {"HOME": "/"} | ({} if told is None else {"GLIBC_TUNABLES": told})
    after = heap.with_large_pages(before)
    assert after.pop("GLIBC_TUNABLES", None) == wanted
    assert after == {"HOME": "/"}


def test_a_program_that_asks_for_large_pages_begins_anew_once(tmp_path):
    lent = tmp_path / "enabled"
    lent.write_text("always [madvise] never")
    script = tmp_path / "program.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from jaxwm import heap\n"
        "print(os.getpid(), sys.argv[1:], sys.flags.optimize, flush=True)\n"
        "heap.LARGE_PAGES = pathlib.Path(sys.argv[1])\n"
        "heap.ask_for_large_pages()\n"
        "print(os.environ['GLIBC_TUNABLES'], sys.stdin.read())\n"
    )
    words = [sys.executable, "-O", str(script), str(lent), "a b"]
    clean = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(words, capture_output=True, text=True, env=clean, input="in", check=True)
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert first.endswith(f"['{lent}', 'a b'] 1")
    assert last == "glibc.malloc.hugetlb=1 in"
