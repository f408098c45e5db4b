"""From a config to a group of workers."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from quartet.assembly import Job
from quartet.config.tables import Config, Launch
from quartet.distributed.team import ALONE, PATIENCE, Team, Together
from quartet.launch import spmd
from quartet.launch.follower import be_a_rank
from quartet.runtime.worker import Group, Local, Worker

RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts."""


def world_of(launch: Launch) -> int:
    """How many ranks there will be."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launch.type == "torchrun" else launch.processes


def team_of(launch: Launch) -> Team:
    """The team of this process, as rank 0; nobody has been started yet. Ray's driver is no rank."""
    world = world_of(launch)
    return Together(0, world) if launch.type != "ray" and (world > 1 or launch.shard) else ALONE


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
    elif not isinstance(job.team, Together):
        group = Local(Worker(job.stages, folder))
    else:
        group = _processes(config.launch, job.team, job, folder, fault)
    try:
        yield group
    finally:
        group.close()


def _processes(launch: Launch, team: Together, job: Job, folder: Path, fault: str | None) -> Group:
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
        torch.set_num_threads(spmd.threads_of(team.world))
        with (folder / "run.log").open("ab") as log:
            started = spmd.start_followers(team.world, port, words, log)
    try:
        spmd.wait_for(started, dist.PrefixStore("team", store), max(launch.deadline, PATIENCE))
        team.join(dist.PrefixStore("team", store), launch.deadline, job.device)
    except BaseException:
        for one in started:
            one.end()
        raise
    return spmd.Spmd(Worker(job.stages, folder, team), store, team.world, launch.deadline, started)
