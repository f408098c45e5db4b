"""A rank that follows rank 0: `python -m quartet.launch.follower RANK WORLD_SIZE PORT DEADLINE
FOLDER [FAULT]`."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from quartet.distributed.process_group import TorchProcessGroup
from quartet.io.heap import share_one_heap
from quartet.io.threads import left_behind
from quartet.launch.spmd import follow
from quartet.launch.store import LOOPBACK, Heartbeat, store_at


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and where the store is."""

    rank: int
    world_size: int
    host: str
    port: int
    local_rank: int | None = None
    """The rank among those on this machine; None: there is only one machine."""


def main() -> None:
    share_one_heap()
    rank, world_size, port, deadline, folder, *fault = sys.argv[1:]
    place = Place(int(rank), int(world_size), LOOPBACK, int(port))
    run_follower(place, float(deadline), Path(folder), fault[0] if fault else None)


def run_follower(place: Place, deadline: float, folder: Path, fault: str | None) -> None:
    """Build what rank 0 builds, from the config in the run's folder, and follow rank 0 until it
    ends."""
    # They reach all ranks; rank 0 decides what they mean. When it ends, the others do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch.distributed as dist

    # It begins before the slow imports: a rank that is still importing is alive.
    heartbeat = Heartbeat(place.host, place.port, place.rank)
    from quartet.assembly import build
    from quartet.config.toml import read_settings
    from quartet.io.heap import keep_freed_memory
    from quartet.runtime.worker import Worker

    config = read_settings(folder / "config.resolved.toml").config
    keep_freed_memory(sharded=bool(config.launch.shard))
    store = store_at(place.host, place.port)
    process_group = TorchProcessGroup(place.rank, place.world_size, place.local_rank)
    job = build(config, fault, process_group)
    process_group.join(dist.PrefixStore("process_group", store), deadline, job.device)
    in_step = follow(Worker(job.stages, folder, process_group), store, place.rank)
    heartbeat.stopped.set()
    process_group.leave(in_step)
    if left_behind():  # the end of the interpreter would wait for them, or abort
        os._exit(0 if in_step else 1)


if __name__ == "__main__":
    main()
