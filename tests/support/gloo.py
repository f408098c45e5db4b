"""Processes of tests that form one group."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist


def join(rank: int, world: int, store: str) -> None:
    """Join the group of a test's ranks, which meet in a file."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )


def leave() -> None:
    """End this process without the interpreter's own end.

    A thread of gloo may still be about to release the tensors of the last collective. Where it asks
    for the interpreter's lock while the interpreter ends, Python ends the thread, and C++ aborts the
    process, whose work is done.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
