"""What threads have freed goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

# Eight threads take 20 MB each, twice, and free it. What glibc learns from the first round makes it
# keep the second.
SCRIPT = """
import sys, threading
import numpy as np
from jaxwm import heap
from jaxwm.envs.host import resident_bytes

def work():
    for _ in range(2):
        both.wait()
        block = np.ones(20 << 20, np.uint8)
        both.wait()
        del block

both = threading.Barrier(8)
before = resident_bytes()
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
def test_what_threads_freed_goes_back():
    def kept(how: str) -> int:
        words = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("borrow") < 20 << 20 < kept("keep")
