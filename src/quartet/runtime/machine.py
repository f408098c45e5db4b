"""What the process asks of the machine it runs on."""

import ctypes
import gc
import sys
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20
"""Bytes above which glibc asks the system for memory each time whatever it is told."""
SMALL = 2**20


def unmet() -> list[str]:
    """What is installed in a version that Quartet does not work with, a sentence each."""
    found = []
    for line in metadata.requires("quartet-rlhf") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            found.append(f"{need.name} is not installed.")
            continue
        if not need.specifier.contains(there, prereleases=True):
            wanted = f"{need.name}{need.specifier}"
            found.append(
                f"{need.name} {there} is installed, Quartet needs {need.specifier}: pip install "
                f'"{wanted}"'
            )
    return found


def keep_freed_memory(in_parts: bool = False) -> None:
    """Let freed memory wait for its next use instead of going back to the system. A training step
    allocates the same tensors over and over; where memory is virtual, having their pages made again
    cost a tenth of the step. Only for a process that is ours, and only where the C library is
    glibc; elsewhere nothing happens.

    `in_parts`: but not tensors of a megabyte. Where models are in parts, whole matrices come and go
    between parts that stay, and the holes they leave were half of a rank's memory.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, SMALL if in_parts else LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Let go of everything that waits, as after a stage whose models are gone."""
    gc.collect()
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
