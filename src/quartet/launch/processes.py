"""The processes that rank 0 starts itself, on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from quartet.distributed.process_group import HERE
from quartet.runtime.worker import WorkerLost


@dataclass
class Follower:
    """The process of another rank."""

    rank: int
    process: "subprocess.Popen[bytes]"

    def end(self) -> None:
        """Wait for the process to end, and kill it after 5 seconds."""
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()

    def kill(self) -> None:
        """Kill the process, without waiting for its end."""
        self.process.send_signal(signal.SIGCONT)  # one that is stopped ends later
        self.process.kill()


def how_it_ended(code: int) -> str:
    """Return how a process has ended that should not have, by its exit code."""
    if code == -signal.SIGKILL:
        return (
            "its process has ended by SIGKILL, which the system sends when memory runs out (then "
            "resume with a smaller optim.micro_batch_tokens or fewer ranks on this machine)."
        )
    cause = (
        f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"with code {code}"
    )
    return f"its process has ended {cause}; see run.log."


def threads_of(world_size: int) -> int:
    """Return the number of threads for each of several processes on this machine: more threads than
    cores would slow all of them down."""
    return max(min(torch.get_num_threads(), (os.cpu_count() or 1) // world_size), 1)


def start_followers(
    world_size: int, port: int, arguments: Sequence[str], log: Any
) -> list[Follower]:
    """Start `python -m quartet.launch.follower RANK WORLD_SIZE PORT …` for every other rank.

    The processes inherit this environment and communicate over loopback only. What they print goes
    to `log`.
    """
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads_of(world_size)),
    }
    command = [sys.executable, "-m", "quartet.launch.follower"]
    return [
        Follower(
            rank,
            subprocess.Popen(
                [*command, str(rank), str(world_size), str(port), *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            ),
        )
        for rank in range(1, world_size)
    ]


def wait_for(followers: Sequence[Follower], store: "dist.Store", patience: float) -> None:
    """Wait until all ranks have started. Raises `WorkerLost` for a process that ends before, or
    does not start within `patience` seconds."""
    until = time.monotonic() + patience
    for follower in followers:
        while not store.check([HERE.format(follower.rank)]):
            if (code := follower.process.poll()) is not None:
                raise WorkerLost(
                    [follower.rank],
                    f"it ended with code {code} before it began; see run.log.",
                )
            if time.monotonic() > until:
                raise WorkerLost(
                    [follower.rank], f"it did not begin within {patience:g} s; see run.log."
                )
            time.sleep(0.02)
