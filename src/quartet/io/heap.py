"""The memory that the C library keeps for this process."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MAX_THRESHOLD = 32 * 2**20
"""The largest mmap threshold that glibc accepts, in bytes: larger blocks always come from the
system."""
SHARDED_THRESHOLD = 2**20
LARGE = 2**28
"""Bytes that are worth returning between two phases of a step."""
HOLES = 5 * 2**26
"""Free bytes that are worth returning after a micro-batch, beside those that its activations have
just freed, which the next one uses again."""


def keep_freed_memory(sharded: bool = False) -> None:
    """Keep freed memory in this process for its next use, instead of returning it to the system.

    A training step allocates the same tensors again and again; to have the system map their pages
    anew took a tenth of the step. It changes the whole process, so importing Quartet does not call
    it; a run does when it starts. Does nothing if the C library is not glibc.

    `sharded` returns blocks of a megabyte and more all the same: a sharded model gathers whole
    matrices and frees them between parameters that stay, and the holes that they left were half of
    a rank's memory.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, SHARDED_THRESHOLD if sharded else MAX_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_one_heap() -> None:
    """Have all threads of this process allocate from one heap of the C library.

    Models compute in a thread of their own, and what `keep_freed_memory` asks for is kept by the
    main heap only: with another one, steps took 1.3 times as long. Threads that have a heap keep
    it, so commands call it before any library starts one. A run in Python calls it when it starts;
    its worker's thread then takes the main heap, unless the program has ended threads whose heaps
    are free. There 8% of the processor time of a step was saved.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return all freed memory to the system, as after a stage whose models are no longer needed."""
    gc.collect()
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


@contextmanager
def holds_for_a_while(size: int) -> Iterator[None]:
    """Work that holds `size` bytes in pieces and then frees them. If they are many, the freed
    memory of what came before is returned to the system first, and theirs afterwards: the holes
    that the pieces leave rarely fit what comes next, and a phase's memory would be added to that of
    the one before. It takes a tenth of a second for a gigabyte."""
    trim = _glibc("malloc_trim") if size >= LARGE else None
    if trim is not None:
        trim(0)
    try:
        yield
    finally:
        if trim is not None:
            trim(0)


@contextmanager
def returns_holes() -> Iterator[None]:
    """Return free memory to the system after some work, as a backward pass, if there is much more
    of it than the work has freed, less what it has allocated.

    The next micro-batch has other lengths, and small objects that stay in between keep its tensors
    out of the holes of the last: with 27 M parameters and LoRA, 650 MB of tensors were in 1.6 GB.
    What is returned costs a page fault for each page when it is used again: 0.15 s for 700 MB.
    """
    mallinfo, trim = _glibc("mallinfo2"), _glibc("malloc_trim")
    if mallinfo is None or trim is None:  # glibc before 2.33, or another library
        yield
        return
    mallinfo.restype = _HeapNumbers
    before = mallinfo().uordblks
    yield
    after = mallinfo()
    if after.fordblks - max(before - after.uordblks, 0) >= HOLES:
        trim(0)


class _HeapNumbers(ctypes.Structure):
    """What mallinfo2 returns: ten numbers, of which `uordblks` is the bytes that are in use, and
    `fordblks` those that are free."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _glibc(function: str) -> Any:
    """Return a function of glibc; None if there is no glibc."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
