"""A rank that follows: `python -m quartet.launch.follower RANK WORLD PORT DEADLINE FOLDER [FAULT]`,
started by rank 0."""

import signal
import sys
from pathlib import Path

from quartet.distributed.process_group import TorchProcessGroup
from quartet.launch.spmd import LOOPBACK, Beating, follow, store_at


def main() -> None:
    rank, world, port, deadline, folder = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        float(sys.argv[4]),
        sys.argv[5],
    )
    be_a_rank(
        LOOPBACK,
        port,
        rank,
        world,
        deadline,
        Path(folder),
        sys.argv[6] if len(sys.argv) > 6 else None,
    )


def be_a_rank(
    host: str, port: int, rank: int, world: int, deadline: float, folder: Path, fault: str | None
) -> None:
    """Build what rank 0 builds, from the config in the run's folder, and follow it to the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to hear
    import torch.distributed as dist

    beating = Beating(host, port, rank)
    from quartet.assembly import build
    from quartet.config.toml import read_settings
    from quartet.runtime.machine import keep_freed_memory
    from quartet.runtime.worker import Worker

    config = read_settings(folder / "config.resolved.toml").config
    keep_freed_memory(in_parts=bool(config.launch.shard))
    store = store_at(host, port)
    process_group = TorchProcessGroup(rank, world)
    job = build(config, fault, process_group)
    process_group.join(dist.PrefixStore("process_group", store), deadline, job.device)
    follow(Worker(job.stages, folder, process_group), store, rank)
    beating.stopped.set()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
