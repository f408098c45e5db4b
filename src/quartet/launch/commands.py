"""How a run is started on several nodes, in words that can be typed."""

import shlex
from collections.abc import Sequence

from quartet.config.run import Launch

FIRST = "NODE0"
"""Stands for the name of the first node."""
SAID = ("launch.type=", "launch.processes=", "launch.address=")
"""Settings that each line has in its own way."""
PORTS = {"torchrun": 29500, "ray": 6379}


def nodes_of(words: str) -> tuple[int, int]:
    """`2x8`: two nodes of eight ranks each. Raises ValueError."""
    count, _, each = words.partition("x")
    if not (count.isdecimal() and each.isdecimal() and int(count) and int(each)):
        raise ValueError(f'--nodes {words}: say how many nodes of how many ranks each, as "2x8".')
    return int(count), int(each)


def commands(words: Sequence[str], launch: Launch, nodes: int, each: int) -> list[str]:
    """Lines that say who does what, and what to type on which node. `words`: those after `quartet
    run`. Raises ValueError."""
    world = nodes * each
    parts = launch.parts(world)
    if world % parts:
        raise ValueError(
            f"launch.shard = {launch.shard}: {nodes} x {each} = {world} ranks are no multiple of "
            f"it."
        )
    if not launch.shard:
        held = "each holds all weights"
    else:
        held = f"{parts} hold each model in parts" + (
            f", {world // parts} such rows" if parts < world else ""
        )
    run = shlex.join(word for word in words if not word.startswith(SAID))
    lines = [
        f"{nodes} x {each} = {world} ranks: {held}; all read and write one run folder, on a disk "
        f"that all nodes see"
    ]
    ways = {"torchrun": _torchrun, "slurm": _slurm, "ray": _ray}
    for name in {"local": ways, "torchrun": ("torchrun", "slurm"), "ray": ("ray",)}[launch.type]:
        lines += ["", *ways[name](run, nodes, each)]
    return lines


def _torchrun(run: str, nodes: int, each: int) -> list[str]:
    place = f"--rdzv-backend=c10d --rdzv-endpoint={FIRST}:{PORTS['torchrun']}"
    return [
        f"torchrun, on each node ({FIRST} is the first one's name):",
        f"    torchrun --nnodes={nodes} --nproc-per-node={each} {place} --no-python quartet run "
        f"{run} launch.type=torchrun",
    ]


def _slurm(run: str, nodes: int, each: int) -> list[str]:
    """A task per rank; each reads its number from Slurm."""
    numbers = f"RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR={FIRST} MASTER_PORT={PORTS['torchrun']}"
    inner = shlex.quote(f"{numbers} quartet run {run} launch.type=torchrun")
    return ["Slurm, once:", f"    srun --nodes={nodes} --ntasks-per-node={each} bash -c {inner}"]


def _ray(run: str, nodes: int, each: int) -> list[str]:
    head = f"{FIRST}:{PORTS['ray']}"
    return [
        "Ray, with the same secret in RAY_AUTH_TOKEN and RAY_AUTH_MODE=token on all nodes:",
        f"    ray start --head --port={PORTS['ray']} --include-dashboard=false      # on {FIRST}",
        *([f"    ray start --address={head}      # on the others"] if nodes > 1 else []),
        f"    quartet run {run} launch.type=ray launch.processes={nodes * each} "
        f"launch.address={head}      # on {FIRST}",
    ]
