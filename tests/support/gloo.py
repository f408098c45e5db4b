"""Processes of tests that form one group."""

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
