"""The processes of a sweep's runs: `quartet run … --resume`, which begins a run or goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quartet.io.cores import computing_threads
from quartet.io.leash import Leash

if TYPE_CHECKING:
    from quartet.sweeps.on_ray import RayRun

STOP_SECONDS = 15.0
"""How long a run has to save and end after SIGTERM; then it is killed."""
COMMAND = (sys.executable, "-m", "quartet")
"""What runs are started with."""


class Processes:
    """Starts runs, and ends those that are left. They end by themselves if this process is killed.

    Each run has its share of the threads: those of OMP_NUM_THREADS, or one for each core that this
    process may use, divided by the number of runs at once.
    """

    def __init__(self, parallel: int, lock: int) -> None:
        """`lock` is an open file that every run inherits."""
        self.threads = max(1, computing_threads() // parallel)
        self.lock = lock
        self.leash = Leash()
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self, words: Sequence[str], folder: Path | None, output: Path
    ) -> "subprocess.Popen[bytes]":
        """Start `quartet` with these words in a folder; what it prints is appended to `output`. It
        has a session of its own: Ctrl-C reaches the sweep alone, which stops its runs once."""
        variables = {"OMP_NUM_THREADS": str(self.threads), **self.leash.variables}
        with output.open("ab") as printed:
            process = subprocess.Popen(
                [*COMMAND, *words],
                cwd=folder,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(self.leash.reading, self.lock),
                start_new_session=True,
            )
        self._running = [p for p in self._running if p.poll() is None] + [process]
        return process

    def close(self) -> None:
        """Stop all runs and wait until they have saved and ended; kill those that do not end."""
        left = [process for process in self._running if process.poll() is None]
        for process in left:
            stop(process)
        until = time.monotonic() + STOP_SECONDS
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.01))
            if process.poll() is None:
                process.kill()
                process.wait()
        self.leash.close()


def stop(process: "subprocess.Popen[bytes] | RayRun") -> None:
    """Let a run save and end."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
