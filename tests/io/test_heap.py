"""The memory of the C library: what a phase leaves is returned before the next."""

import subprocess
import sys

import pytest

from quartet.io import heap

pytestmark = pytest.mark.slow

MEGABYTES = """
import ctypes, sys
import torch
from quartet.io.heap import holds_for_a_while, keep_freed_memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 1e6

keep_freed_memory()
start = resident()
with holds_for_a_while(int(sys.argv[1])):
    # Half of the pieces stay, so that the freed ones are holes inside of the heap.
    pieces = [torch.ones(2**18) for _ in range(300)]
    del pieces[::2]
print(resident() - start)
"""


def growth(size):
    command = [sys.executable, "-c", MEGABYTES, str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(heap._glibc("malloc_trim") is None, reason="the C library is not glibc")
def test_holes_that_a_large_phase_leaves_are_returned_and_those_of_a_small_one_kept():
    kept, returned = growth(heap.LARGE - 1), growth(heap.LARGE)
    assert kept - returned == pytest.approx(150 * 2**20 / 1e6, rel=0.2)


def test_an_error_passes_through(monkeypatch):
    trims = []
    monkeypatch.setattr(heap, "_glibc", lambda name: trims.append)
    with pytest.raises(KeyError), heap.holds_for_a_while(heap.LARGE):
        raise KeyError
    assert trims == [0, 0]


HOLES = (
    MEGABYTES.replace("holds_for_a_while", "returns_holes").partition("start =")[0]
    + """
pieces = [torch.ones(2**18) for _ in range(int(sys.argv[1]))]
before = resident()
if sys.argv[2] == "earlier":
    del pieces[::2]
with returns_holes():
    del pieces[::2]
print(before - resident())
"""
)


@pytest.mark.skipif(heap._glibc("mallinfo2") is None, reason="the C library is not glibc 2.33")
def test_holes_are_returned_once_they_are_many():
    """Of 800 MiB in pieces, 400 were free before and 200 more are freed: all 600 are returned. Of 800 that are freed in the work
    itself, nothing, since the next micro-batch fills them; nor of 200 MiB and 100."""

    def returned(count, when):
        command = [sys.executable, "-c", HOLES, str(count), when]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert returned(800, "earlier") == pytest.approx(600 * 2**20 / 1e6, rel=0.1)
    assert returned(1_600, "in the work") < 10
    assert returned(400, "earlier") < 10
