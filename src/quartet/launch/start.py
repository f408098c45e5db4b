"""From a config to the workers of its run."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from quartet.assembly import build
from quartet.config.run import Launch
from quartet.config.tables import Config
from quartet.distributed.process_group import (
    PATIENCE,
    SINGLE_PROCESS,
    ProcessGroup,
    TorchProcessGroup,
)
from quartet.io.install import install_command
from quartet.launch.follower import Place, run_follower
from quartet.launch.processes import Follower, start_followers, threads_of, wait_for
from quartet.launch.spmd import ProcessWorkers
from quartet.launch.store import own_store, store_at
from quartet.runtime.faults import FAULTS
from quartet.runtime.job import Job
from quartet.runtime.lifecycle import CannotRun
from quartet.runtime.machine import unmet_requirements
from quartet.runtime.worker import LocalWorkers, Worker, WorkerGroup

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets for each process."""


def world_size_of(launch: Launch) -> int:
    """Return how many ranks the run has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launch.type == "torchrun" else launch.processes


def local_rank_of(launch: Launch) -> int | None:
    """Return the rank of this process among those that torchrun has started on this machine; None
    where that is not said."""
    said = os.environ.get("LOCAL_RANK") if launch.type == "torchrun" else None
    return None if said is None else int(said)


def process_group_of(launch: Launch) -> ProcessGroup:
    """Return the process group of this process as rank 0. It has not joined the others, which may
    not have been started. Ray's driver is no rank and gets `SINGLE_PROCESS`."""
    world_size = world_size_of(launch)
    return (
        TorchProcessGroup(0, world_size, local_rank_of(launch))
        if launch.type != "ray" and (world_size > 1 or launch.shard)
        else SINGLE_PROCESS
    )


def job_of(
    config: Config,
    fault: str | None = None,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> Job:
    """Return the job of a config for this process, as rank 0. `fault` is a mistake to plant,
    `objects` are the rewards that were given as Python objects.

    Raises `CannotRun` if what is installed does not fit or there is no such fault, and the errors
    of `build`.
    """
    if problems := unmet_requirements():
        raise CannotRun("\n".join(problems))
    if fault is not None and fault not in FAULTS:
        raise CannotRun(f"--break {fault}: known are {', '.join(FAULTS)}.")
    if fault is not None and config.rl_stage is None:
        raise CannotRun(f"--break {fault}: there is no RL stage to break.")
    if config.launch.type == "ray" and importlib.util.find_spec("ray") is None:
        raise CannotRun(f'launch.type = "ray" needs the package ray: {install_command("ray")}.')
    return build(config, fault, process_group_of(config.launch), objects)


def starts_as_follower(launch: Launch) -> bool:
    """Return whether torchrun or srun has started this process as a rank other than 0."""
    return launch.type == "torchrun" and int(os.environ.get("RANK", "0")) > 0


def follow_rank_zero(launch: Launch) -> None:
    """Be the rank that torchrun or srun has started. Rank 0 has written into the store which run it
    is."""
    place = Place(
        int(os.environ["RANK"]),
        world_size_of(launch),
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        local_rank_of(launch),
    )
    folder, _, fault = store_at(place.host, place.port).get("run").decode().partition("\n")
    run_follower(place, launch.deadline, Path(folder), fault or None)


@contextlib.contextmanager
def open_workers(
    config: Config, job: Job, folder: Path, fault: str | None
) -> Iterator[WorkerGroup]:
    """Start the workers of a run, and end them on leaving. What the processes of other ranks print
    goes to the run's log."""
    if config.launch.type == "ray":
        from quartet.launch.on_ray import RayWorkers

        workers: WorkerGroup = RayWorkers(config.launch, config.run.device, folder, fault)
    elif not isinstance(job.process_group, TorchProcessGroup):
        workers = LocalWorkers(Worker(job.stages, folder))
    else:
        workers = _process_workers(config.launch, job.process_group, job, folder, fault)
    try:
        yield workers
    finally:
        workers.close()


def _process_workers(
    launch: Launch, process_group: TorchProcessGroup, job: Job, folder: Path, fault: str | None
) -> WorkerGroup:
    """Start or find the other ranks, and join them as rank 0."""
    followers: list[Follower] = []
    world_size = process_group.world_size
    if launch.type == "torchrun":
        # torchrun's agent holds the store; under srun, which has none, rank 0 does.
        has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = store_at(host, port, is_server=not has_agent)
        store.set("run", f"{folder.resolve()}\n{fault or ''}")
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store, port = own_store()
        arguments = [str(launch.deadline), str(folder.resolve()), *([fault] if fault else [])]
        torch.set_num_threads(threads_of(world_size))
        with (folder / "run.log").open("ab") as log:
            followers = start_followers(world_size, port, arguments, log)
    # A connection of its own: while groups are made, a thread waits in it, and rank 0 looks at the
    # others' reports meanwhile.
    connection: dist.Store = store.clone()  # type: ignore[attr-defined]
    group_store = dist.PrefixStore("process_group", connection)
    try:
        wait_for(followers, group_store, max(launch.deadline, PATIENCE))
        process_group.join(group_store, launch.deadline, job.device)
    except BaseException:
        process_group.leave(in_step=False)
        for follower in followers:
            follower.end()
        raise
    worker = Worker(job.stages, folder, process_group)
    return ProcessWorkers(worker, store, world_size, launch.deadline, followers, process_group)
