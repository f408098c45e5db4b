"""Ranks that are Ray's actors: on this machine, or wherever the cluster has room. The driver is the
run's process, and no rank.

Actors get the run folder's path, and so need a file system that all share; of the driver's
environment they get nothing. Ray's own ports stay on loopback where this process starts it.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.config.run import Launch
from quartet.distributed.process_group import PATIENCE
from quartet.launch.spmd import by_another
from quartet.runtime.worker import Handle, Worker, WorkerLost, mapped

ALIVE = 10.0
"""Seconds in which a rank that is alive says so."""


class Rank:
    """What an actor is: a worker, and what it takes to make one."""

    def __init__(self, rank: int, world: int, deadline: float, interface: str | None) -> None:
        self.rank, self.world, self.deadline = rank, world, deadline
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        self.worker: Worker | None = None

    def alive(self) -> bool:
        return True

    def address(self) -> tuple[str, int]:
        """Where the others find this rank's store."""
        import ray

        with socket.socket() as probe:
            probe.bind((ray.util.get_node_ip_address(), 0))
            host, port = probe.getsockname()
        return str(host), int(port)

    def join(self, host: str, port: int, here: str, folder: str, fault: str | None) -> None:
        """`here`: where the driver is, and what its files' names start from."""
        import torch.distributed as dist

        from quartet.assembly import build
        from quartet.config.toml import read_settings
        from quartet.distributed.process_group import TorchProcessGroup

        os.chdir(here)
        store = dist.TCPStore(host, port, is_master=self.rank == 0, wait_for_workers=False)
        process_group = TorchProcessGroup(self.rank, self.world)
        job = build(
            read_settings(Path(folder) / "config.resolved.toml").config, fault, process_group
        )
        process_group.join(dist.PrefixStore("process_group", store), self.deadline, job.device)
        self.worker = Worker(job.stages, Path(folder), process_group)

    def do(self, name: str, *args: Any) -> Any:
        return getattr(self.worker, name)(*args)


class OnRay:
    """The group of all actors."""

    def __init__(self, launch: Launch, device: str, folder: Path, fault: str | None) -> None:
        """`device`: the config's. Each rank gets a GPU where the cluster has enough, unless it is
        to be the CPU."""
        import ray

        self.world, self.deadline, self._busy = launch.processes, launch.deadline, False
        self.ranks: list[Any] = []
        self.owner = not ray.is_initialized()
        if self.owner and launch.address is None:
            here = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init(num_cpus=self.world, log_to_driver=False, logging_level="error", **here)
        elif self.owner:
            ray.init(address=launch.address, log_to_driver=False, logging_level="error")
        interface = "lo" if launch.address is None else os.environ.get("GLOO_SOCKET_IFNAME")
        gpus = int(
            device != "cpu"
            and (device != "auto" or ray.cluster_resources().get("GPU", 0) >= self.world)
        )
        self.placement = ray.util.placement_group(
            [{"CPU": 1, "GPU": gpus}] * self.world, strategy="SPREAD"
        )
        try:
            self._begin(gpus, interface, folder, fault)
        except BaseException:  # a process that starts itself anew would leave them behind
            self.close()
            raise

    def _begin(self, gpus: int, interface: str | None, folder: Path, fault: str | None) -> None:
        """The actors, joined."""
        import ray

        try:
            ray.get(self.placement.ready(), timeout=PATIENCE)
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"the Ray cluster has no room for {self.world} ranks of one "
                f"{'GPU' if gpus else 'CPU'} each."
            ) from None
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(Rank)
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self.ranks = [
            actor.options(
                scheduling_strategy=place(self.placement, placement_group_bundle_index=rank)
            ).remote(rank, self.world, self.deadline, interface)
            for rank in range(self.world)
        ]
        [(host, port)] = self._all([self.ranks[0].address.remote()])
        where = (host, port, str(Path.cwd()), str(folder.resolve()), fault)
        self._all([rank.join.remote(*where) for rank in self.ranks])

    def call(self, name: str, *args: Any) -> list[Any]:
        return self.start(name, *args).result()

    def map(self, name: str, rows: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        def call(dealt: list[list[Any]]) -> list[list[Any]]:
            self._busy = True
            return self._all(
                [rank.do.remote(name, mine) for rank, mine in zip(self.ranks, dealt, strict=True)]
            )

        return mapped(rows, lengths, self.world, call)

    def start(self, name: str, *args: Any) -> Handle:
        self._busy = True
        return _Later(self, [rank.do.remote(name, *args) for rank in self.ranks])

    def untouched(self) -> bool:
        return not self._busy

    def close(self) -> None:
        import ray

        for rank in self.ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank)
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(self.placement)
        if self.owner:
            ray.shutdown()

    def _all(self, asked: Sequence[Any]) -> list[Any]:
        """What each of them says, however long it takes, as long as all are alive: that is asked at
        every deadline."""
        import ray

        waiting = list(asked)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=self.deadline)
            if not ready and (dead := self._dead()):
                raise WorkerLost(dead, f"no sign of life for {ALIVE:g} s.")
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise self._cause(error.as_instanceof_cause(), asked) from None
            except ray.exceptions.RayActorError:
                raise WorkerLost(
                    self._dead() or [list(asked).index(ready[0])], "its process is gone."
                ) from None
        self._busy = False
        return list(ray.get(list(asked)))

    def _cause(self, error: Exception, asked: Sequence[Any]) -> Exception:
        """Why one could not go on: others that are lost, or itself."""
        import ray

        if not by_another(error):
            return error
        if dead := self._dead():
            return WorkerLost(dead, "its process is gone.")
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ALIVE)
        stuck = [rank for rank, one in enumerate(asked) if one in silent]
        return (
            WorkerLost(stuck, f"alive, but not where the others waited for it ({error}).")
            if stuck
            else error
        )

    def _dead(self) -> list[int]:
        """Ranks that do not say within a while that they are alive."""
        import ray

        asked = {rank.alive.remote(): number for number, rank in enumerate(self.ranks)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ALIVE)
        silent = [number for ref, number in asked.items() if ref not in ready]
        for ref in ready:
            try:
                ray.get(ref)
            except Exception:
                silent.append(asked[ref])
        return sorted(silent)


@dataclass
class _Later:
    group: OnRay
    asked: Sequence[Any]

    def result(self) -> list[Any]:
        return self.group._all(self.asked)
