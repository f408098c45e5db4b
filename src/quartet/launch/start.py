"""From a config to a group of workers."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

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
from quartet.launch import spmd
from quartet.launch.follower import be_a_rank
from quartet.runtime.faults import FAULTS
from quartet.runtime.job import Job
from quartet.runtime.lifecycle import CannotRun
from quartet.runtime.machine import unmet
from quartet.runtime.worker import Group, Local, Worker

RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts."""


def world_of(launch: Launch) -> int:
    """How many ranks there will be."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launch.type == "torchrun" else launch.processes


def process_group_of(launch: Launch) -> ProcessGroup:
    """The team of this process, as rank 0; nobody has been started yet. Ray's driver is no rank."""
    world = world_of(launch)
    return (
        TorchProcessGroup(0, world)
        if launch.type != "ray" and (world > 1 or launch.shard)
        else SINGLE_PROCESS
    )


def job_of(config: Config, fault: str | None = None) -> Job:
    """Return the job of a config for this process, as rank 0. `fault` is a mistake to plant.

    Raises `CannotRun` if what is installed does not fit or there is no such fault, and the errors
    of `build`.
    """
    if problems := unmet():
        raise CannotRun("\n".join(problems))
    if fault is not None and fault not in FAULTS:
        raise CannotRun(f"--break {fault}: known are {', '.join(FAULTS)}.")
    if fault is not None and config.rl_stage is None:
        raise CannotRun(f"--break {fault}: there is no RL stage to break.")
    return build(config, fault, process_group_of(config.launch))


def follows(launch: Launch) -> bool:
    """Whether this process is one that torchrun or srun has started, and not the first."""
    return launch.type == "torchrun" and int(os.environ.get("RANK", "0")) > 0


def follow_the_first(launch: Launch) -> None:
    """Be that rank. What is to be done, rank 0 has left in the store."""
    host, port, rank = (
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["RANK"]),
    )
    folder, _, fault = spmd.store_at(host, port).get("run").decode().partition("\n")
    be_a_rank(host, port, rank, world_of(launch), launch.deadline, Path(folder), fault or None)


@contextlib.contextmanager
def crew(config: Config, job: Job, folder: Path, fault: str | None) -> Iterator[Group]:
    """Those who do the work, for as long as it takes. What followers print goes to the run's
    log."""
    if config.launch.type == "ray":
        from quartet.launch.on_ray import OnRay

        group: Group = OnRay(config.launch, config.run.device, folder, fault)
    elif not isinstance(job.process_group, TorchProcessGroup):
        group = Local(Worker(job.stages, folder))
    else:
        group = _processes(config.launch, job.process_group, job, folder, fault)
    try:
        yield group
    finally:
        group.close()


def _processes(
    launch: Launch, process_group: TorchProcessGroup, job: Job, folder: Path, fault: str | None
) -> Group:
    started: list[spmd.Process] = []
    if launch.type == "torchrun":
        # torchrun's agent keeps the store; under srun it is rank 0 that does.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = spmd.store_at(host, port, keeps=not agent)
        store.set("run", f"{folder.resolve()}\n{fault or ''}")
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store, port = spmd.own_store()
        words = [str(launch.deadline), str(folder.resolve()), *([fault] if fault else [])]
        torch.set_num_threads(spmd.threads_of(process_group.world_size))
        with (folder / "run.log").open("ab") as log:
            started = spmd.start_followers(process_group.world_size, port, words, log)
    try:
        spmd.wait_for(
            started, dist.PrefixStore("process_group", store), max(launch.deadline, PATIENCE)
        )
        process_group.join(dist.PrefixStore("process_group", store), launch.deadline, job.device)
    except BaseException:
        for one in started:
            one.end()
        raise
    return spmd.Spmd(
        Worker(job.stages, folder, process_group),
        store,
        process_group.world_size,
        launch.deadline,
        started,
    )
