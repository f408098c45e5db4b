"""Workers that are Ray actors: on this machine, or wherever the cluster has room. The run's process
drives them and is no rank itself.

Actors get the path of the run folder, so all of them need a file system that holds it. They get
nothing of the driver's environment. Where this process starts Ray, Ray's ports are on loopback.
"""

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet.config.run import Launch
from quartet.distributed.process_group import PATIENCE
from quartet.io.threads import WAKE_SECONDS
from quartet.launch.spmd import by_another, stuck_ranks
from quartet.runtime.worker import Worker, WorkerLost

ALIVE = 10.0
"""Seconds that a rank has to answer that it is alive."""


class Rank:
    """The actor of one rank: it builds a worker and calls its methods."""

    def __init__(self, rank: int, world_size: int, deadline: float, interface: str | None) -> None:
        self.rank, self.world_size, self.deadline = rank, world_size, deadline
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        self.worker: Worker | None = None

    def alive(self) -> bool:
        return True

    def address(self) -> tuple[str, int]:
        """Return a free address of this machine, for the store."""
        import ray

        with socket.socket() as probe:
            probe.bind((ray.util.get_node_ip_address(), 0))
            host, port = probe.getsockname()
        return str(host), int(port)

    def join(
        self, store_address: tuple[str, int], directory: str, folder: str, fault: str | None
    ) -> None:
        """Build the worker and connect to the other ranks. `directory` is the driver's working
        directory, which relative paths of the config start from."""
        import torch.distributed as dist

        from quartet.assembly import build
        from quartet.config.toml import read_settings
        from quartet.distributed.process_group import TorchProcessGroup

        os.chdir(directory)
        is_server = self.rank == 0
        store = dist.TCPStore(*store_address, is_master=is_server, wait_for_workers=False)
        process_group = TorchProcessGroup(self.rank, self.world_size)
        config = read_settings(Path(folder) / "config.resolved.toml").config
        job = build(config, fault, process_group)
        process_group.join(dist.PrefixStore("process_group", store), self.deadline, job.device)
        self.worker = Worker(job.stages, Path(folder), process_group)

    def do(self, name: str, *args: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self.worker, name)(*args)


class RayWorkers:
    """The worker group of all actors."""

    def __init__(self, launch: Launch, device: str, folder: Path, fault: str | None) -> None:
        """`device` is the config's. Every rank gets a GPU if the cluster has enough of them, except
        with "cpu"."""
        import ray

        self.world_size, self.deadline, self._busy = launch.processes, launch.deadline, False
        self._kept_step: int | None = None
        """The last step that the actors have taken."""
        self.ranks: list[Any] = []
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray and launch.address is None:
            loopback = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init(
                num_cpus=self.world_size, log_to_driver=False, logging_level="error", **loopback
            )
        elif self.owns_ray:
            ray.init(address=launch.address, log_to_driver=False, logging_level="error")
        interface = "lo" if launch.address is None else os.environ.get("GLOO_SOCKET_IFNAME")
        enough = ray.cluster_resources().get("GPU", 0) >= self.world_size
        gpus = int(device != "cpu" and (device != "auto" or enough))
        self.placement = ray.util.placement_group(
            [{"CPU": 1, "GPU": gpus}] * self.world_size, strategy="PACK"
        )
        try:
            self._start(gpus, interface, folder, fault)
        except BaseException:  # a run that restarts its process would leave the actors behind
            self.close()
            raise

    def _start(self, gpus: int, interface: str | None, folder: Path, fault: str | None) -> None:
        """Start the actors and let them join each other."""
        import ray

        try:
            ray.get(self.placement.ready(), timeout=PATIENCE)
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"the Ray cluster has no room for {self.world_size} ranks of one "
                f"{'GPU' if gpus else 'CPU'} each."
            ) from None
        # Two at once: a rank that is at work must still be able to answer that it is alive.
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(Rank)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self.ranks = [
            actor.options(
                scheduling_strategy=strategy(self.placement, placement_group_bundle_index=rank)
            ).remote(rank, self.world_size, self.deadline, interface)
            for rank in range(self.world_size)
        ]
        [address] = self._all([self.ranks[0].address.remote()])
        arguments = (address, str(Path.cwd()), str(folder.resolve()), fault)
        self._all([rank.join.remote(*arguments) for rank in self.ranks])

    def call(self, name: str, *args: Any) -> list[Any]:
        self._busy = True
        results = self._all([rank.do.remote(name, *args) for rank in self.ranks])
        if name == "step" and (progress := results[0].progress) is not None:
            self._kept_step = progress.number
        self._busy = False
        return results

    def untouched(self) -> bool:
        """Return whether no call is under way."""
        return not self._busy

    def halt(self, step: int) -> bool:
        """Return False in the middle of a call: the state is in the actors, which are at work."""
        return not self._busy and self._kept_step == step

    def close(self) -> None:
        import ray

        for rank in self.ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank)
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(self.placement)
        if self.owns_ray:
            ray.shutdown()

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """Return the results of the ranks' calls. A call may take any time as long as all ranks are
        alive, which is checked whenever none has finished within the deadline."""
        import ray

        waiting = list(calls)
        while waiting:
            ready, waiting = self._wait(waiting)
            if not ready and (dead := self._dead()):
                raise WorkerLost(dead, f"no sign of life for {ALIVE:g} s.")
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise self._cause(error.as_instanceof_cause(), calls) from None
            except ray.exceptions.RayActorError:
                raise WorkerLost(
                    self._dead() or [list(calls).index(ready[0])], "its process is gone."
                ) from None
        return list(ray.get(list(calls)))

    def _wait(self, calls: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Wait for the first of some calls, at most until the deadline, in short parts: a signal is
        handled between two of them. Return the calls that are done, and the others."""
        import ray

        until = time.monotonic() + self.deadline
        while True:
            ready, waiting = ray.wait(list(calls), num_returns=1, timeout=WAKE_SECONDS)
            if ready or time.monotonic() > until:
                return ready, waiting

    def _cause(self, error: Exception, calls: Sequence[Any]) -> Exception:
        """Return why a rank could not finish its call: ranks that are lost or wait elsewhere, or
        its own error."""
        import ray

        if not by_another(error):
            return error
        if dead := self._dead():
            return WorkerLost(dead, "its process is gone.")
        finished, unfinished = ray.wait(list(calls), num_returns=len(calls), timeout=ALIVE)
        for call in finished:
            try:
                ray.get(call)
            except ray.exceptions.RayTaskError as reported:
                cause: Exception = reported.as_instanceof_cause()
                if not by_another(cause):
                    return cause
        stuck = [rank for rank, call in enumerate(calls) if call in unfinished]
        return stuck_ranks(stuck, error, self.deadline) if stuck else error

    def _dead(self) -> list[int]:
        """Return the ranks that do not answer within `ALIVE` seconds."""
        import ray

        calls = {rank.alive.remote(): number for number, rank in enumerate(self.ranks)}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ALIVE)
        dead = [number for call, number in calls.items() if call not in ready]
        for call in ready:
            try:
                ray.get(call)
            except Exception:  # the answer is that the actor has died
                dead.append(calls[call])
        return sorted(dead)
