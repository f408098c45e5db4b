"""The cores that this process may compute on."""

import os


def computing_threads() -> int:
    """Return how many threads a product has: those that OMP_NUM_THREADS asks for, or one for each
    core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
