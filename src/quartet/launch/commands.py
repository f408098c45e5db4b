"""The commands that start a run on several nodes."""

import shlex
from collections.abc import Sequence

from quartet.config.run import Launch

FIRST = "NODE0"
"""Stands for the name of the first node."""
SET_BY_COMMAND = ("launch.type=", "launch.processes=", "launch.address=")
"""Settings that each way of starting has its own values for."""
PORTS = {"torchrun": 29500, "ray": 6379}


def nodes_of(text: str) -> tuple[int, int]:
    """Return the number of nodes and of ranks on each from a text such as `2x8`. Raises ValueError
    for any other text."""
    nodes, _, ranks = text.partition("x")
    if not (nodes.isdecimal() and ranks.isdecimal() and int(nodes) and int(ranks)):
        raise ValueError(f'--nodes {text}: say how many nodes of how many ranks each, as "2x8".')
    return int(nodes), int(ranks)


def commands(words: Sequence[str], launch: Launch, nodes: int, ranks: int) -> list[str]:
    """Return lines that say how models are spread over the ranks, and what to type on which node.

    `words` are the arguments after `quartet run`, and `ranks` is the number on each node. Raises
    ValueError if the number of ranks is no multiple of `launch.shard`.
    """
    world_size = nodes * ranks
    parts = launch.parts(world_size)
    if world_size % parts:
        raise ValueError(
            f"launch.shard = {launch.shard}: {nodes} x {ranks} = {world_size} ranks are no "
            f"multiple of it."
        )
    if not launch.shard:
        layout = "each holds all weights"
    else:
        layout = f"{parts} hold each model in parts" + (
            f", {world_size // parts} such rows" if parts < world_size else ""
        )
    run = shlex.join(word for word in words if not word.startswith(SET_BY_COMMAND))
    lines = [
        f"{nodes} x {ranks} = {world_size} ranks: {layout}; all read and write one run folder, on "
        f"a disk that all nodes see"
    ]
    ways = {"torchrun": _torchrun, "slurm": _slurm, "ray": _ray}
    for name in {"local": ways, "torchrun": ("torchrun", "slurm"), "ray": ("ray",)}[launch.type]:
        lines += ["", *ways[name](run, nodes, ranks)]
    return lines


def _torchrun(run: str, nodes: int, ranks: int) -> list[str]:
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={FIRST}:{PORTS['torchrun']}"
    return [
        f"torchrun, on each node ({FIRST} is the first one's name):",
        f"    torchrun --nnodes={nodes} --nproc-per-node={ranks} {rendezvous} --no-python "
        f"quartet run {run} launch.type=torchrun",
    ]


def _slurm(run: str, nodes: int, ranks: int) -> list[str]:
    """Return the command for Slurm, which starts a task per rank. Its variables become those that
    torchrun would set."""
    variables = (
        f"RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
        f"MASTER_ADDR={FIRST} MASTER_PORT={PORTS['torchrun']}"
    )
    task = shlex.quote(f"{variables} quartet run {run} launch.type=torchrun")
    return ["Slurm, once:", f"    srun --nodes={nodes} --ntasks-per-node={ranks} bash -c {task}"]


def _ray(run: str, nodes: int, ranks: int) -> list[str]:
    head = f"{FIRST}:{PORTS['ray']}"
    return [
        "Ray, with the same secret in RAY_AUTH_TOKEN and RAY_AUTH_MODE=token on all nodes:",
        f"    ray start --head --port={PORTS['ray']} --include-dashboard=false      # on {FIRST}",
        *([f"    ray start --address={head}      # on the others"] if nodes > 1 else []),
        f"    quartet run {run} launch.type=ray launch.processes={nodes * ranks} "
        f"launch.address={head}      # on {FIRST}",
    ]
