"""The runs of a sweep as Ray actors: each is the command `quartet run … --resume`, started by an
actor on whichever machine of the cluster has room for it.

All machines need Quartet, and a file system that holds the sweep's folder under the same path. An
actor gets nothing of the environment of the sweep's process.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet import files
from quartet.io.leash import Leash
from quartet.sweeps import processes
from quartet.sweeps.folder import PATIENCE
from quartet.sweeps.spec import RayRuns

LOST = -9
"""The exit code of a run whose actor is gone."""


class RunActor:
    """The actor of one run. The run ends with it, whatever ends it."""

    def __init__(self) -> None:
        self.leash, self.stopped = Leash(), threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, words: Sequence[str], folder: str, output: str, threads: int) -> int:
        """Run Python with these words in a folder, and return its exit code. What it prints is
        appended to the file `output`, which is locked meanwhile: a run that a sweep before left
        behind may still be saving."""
        with Path(output).open("ab") as printed:
            until = time.monotonic() + PATIENCE
            while not files.try_lock(printed) and time.monotonic() < until:
                time.sleep(0.1)
            variables = {"OMP_NUM_THREADS": str(threads), **self.leash.variables}
            if self.stopped.is_set():
                return LOST
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(self.leash.reading,),
                start_new_session=True,
            )
        if self.stopped.is_set():  # since it was looked at last
            self.process.terminate()
        return self.process.wait()

    def stop(self) -> None:
        """Let the run save and end, or not begin."""
        self.stopped.set()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()


class RayRun:
    """A run that an actor has, or that waits for room; what a sweep reads of a process."""

    def __init__(self, actor: Any, ended: Any, output: Path) -> None:
        """`ended` is the future of its exit code."""
        self.actor, self.ended, self.output = actor, ended, output
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None as long as the run goes on or waits. A run whose actor is gone
        has the code −9, and its file of output says so."""
        return self.wait(0.0)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code as soon as there is one; None after so many seconds."""
        import ray

        if self.code is None and ray.wait([self.ended], timeout=seconds)[0]:
            try:
                self.code = int(ray.get(self.ended))
            except Exception as error:  # the actor, its machine, or the folder there
                self.code = LOST
                words = str(error).strip().splitlines() or [repr(error)]
                with self.output.open("a", encoding="utf-8") as file:
                    file.write(f"its Ray actor failed: {words[-1]}\n")
            self.kill()  # gives back its room
        return self.code

    def send_signal(self, number: int) -> None:
        """Let the run save and end; `number` is SIGTERM."""
        del number
        self.actor.stop.remote()

    def kill(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self.actor)


class RayProcesses:
    """Starts runs as actors, and ends those that are left. What `Processes` is on this machine."""

    def __init__(self, settings: RayRuns) -> None:
        """Connect to the cluster, or start Ray on this machine."""
        import ray

        self.settings, self.threads = settings, settings.cpus
        self._running: list[RayRun] = []
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray:
            # Without an address: a cluster of this machine alone, on loopback.
            here: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            more = here if settings.address is None else {"address": settings.address}
            ray.init(log_to_driver=False, logging_level="error", **more)

    def start(self, words: Sequence[str], folder: Path | None, output: Path) -> RayRun:
        """Start `quartet` with these words in a folder as soon as the cluster has room for it."""
        import ray

        settings, place = self.settings, str((folder or Path.cwd()).resolve())
        # Two at once: a run that goes on must still be told to stop.
        remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_concurrency=2)
        actor = remote(RunActor).remote()
        command = [*processes.COMMAND[1:], *words]
        ended = actor.run.remote(command, place, str(output.resolve()), settings.cpus)
        self._running = [run for run in self._running if run.code is None]
        self._running.append(RayRun(actor, ended, output))
        return self._running[-1]

    def close(self) -> None:
        """Stop all runs and wait until they have saved and ended; kill those that do not end."""
        import ray

        left = [run for run in self._running if run.poll() is None]
        for run in left:
            run.actor.stop.remote()
        until = time.monotonic() + processes.STOP_SECONDS
        for run in left:
            if run.wait(max(until - time.monotonic(), 0.01)) is None:
                run.kill()
        if self.owns_ray:
            ray.shutdown()
