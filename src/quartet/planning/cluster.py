"""What an RL run would take on a cluster: memory by role, seconds by phase, and what limits them.
docs/scaling.md has the formulas.

Nothing here was measured on the machines in question. Their numbers are the makers', the share of
them that is reached is given as a range, and so is every estimate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quartet.config.tables import Config
from quartet.planning.gpu_memory import (
    Copies,
    Workload,
    generation_memory,
    load_peak,
    memory_between_updates,
    native_generation,
    tokens_that_fit,
    training_memory,
    workload,
)
from quartet.planning.hardware import (
    BANDWIDTH,
    COMPUTE,
    DISK,
    GB,
    LEGEND,
    MEASURED,
    RESERVED,
    CannotFit,
    Cluster,
    Gpu,
    Span,
    marked,
)
from quartet.planning.memory import FLOAT

# --- time


def generating(
    work: Workload, gpu: Gpu, count: int, taken: float = 0.0, in_turn: bool = False
) -> tuple[Span, str, Copies]:
    """Return the time to sample one step's responses on `count` GPUs, what limits it, and the
    copies of the weights with which it is shortest.

    A token of every row costs one reading of the weights and of the rows' keys and values, or its
    arithmetic, whichever is longer. A free slot takes the next response. The time is never less
    than that of the longest response. `in_turn` says that the GPUs that train sample; they do it by
    themselves, each with a copy, unless servers share them.
    """
    if in_turn and not work.served:
        copies = native_generation(work, gpu, count, taken)
        return (*_generating(work, gpu, count, copies), copies)
    ways = [
        (*_generating(work, gpu, count, copies), copies)
        for copies in generation_memory(work, gpu, count, taken)
    ]
    return min(ways, key=lambda way: way[0].middle)


def _generating(work: Workload, gpu: Gpu, count: int, copies: Copies) -> tuple[Span, str]:
    each, rows = copies.each, copies.rows
    turns = max(work.rows / (rows * copies.count), 1.0)
    weights, rate = float(work.number * work.parameters), gpu.rate(work.number)
    cache = rows * work.row_bytes(work.prompt + work.response / 2)
    read = (weights + cache) / (gpu.bandwidth * each)
    active = work.parameters - work.model.idle_parameters
    arithmetic = 2.0 * active * rows / (rate * each)
    prefill = 2.0 * active * work.rows * work.prompt / (rate * count)
    alone = weights / (gpu.bandwidth * each)
    spans = []
    for compute, bandwidth in zip(reversed(COMPUTE), reversed(BANDWIDTH), strict=True):
        token = max(read / bandwidth, arithmetic / compute)
        # Few rows are left when the longest response ends, so its tokens cost as much as one row's.
        tail = (work.longest - work.response) * alone / bandwidth
        spans.append(turns * work.response * token + tail + prefill / compute)
    binds = "bandwidth" if read / BANDWIDTH[1] > arithmetic / COMPUTE[1] else "compute"
    tail = (work.longest - work.response) * alone / BANDWIDTH[1]
    return Span(*spans), "the longest answer" if tail > spans[0] / 2 else binds


def training(work: Workload, gpu: Gpu, count: int) -> Span:
    """Return the time of one step's updates on `count` GPUs.

    A trained parameter takes 6 operations per token and epoch, 8 with checkpointing; under adapters
    the gradients of the weights, 2 of the 6, fall away. Every model takes 2 more, for the forward
    passes that score the responses; under adapters, the reference and the reward model take them
    too.
    """
    tokens = work.rows * (work.prompt + work.response)
    each = (8 if work.checkpointing else 6) - 2 * (work.adapter is not None)
    trained = each * work.learners * work.epochs
    reading = work.learners + (work.frozen if work.adapter is None else work.frozen + 2)
    active = work.parameters - work.model.idle_parameters
    operations = active * tokens * (trained + 2 * reading)
    rate = gpu.rate(work.number) * count
    return Span(*(operations / (rate * part) for part in reversed(COMPUTE)))


def push_bytes(work: Workload) -> float:
    """Return the bytes of the new weights that servers get."""
    return float(work.number * work.parameters)


def pushing(work: Workload, ranks: int, gpu: Gpu, served: bool) -> Span:
    """Return the time until the generators have new weights.

    Servers read a folder that the trainer writes: both go over a disk; or rank 0 sends them over
    its network. Ranks that train and sample gather the weights of all, in float32, over their
    network; one rank reads what it has.
    """
    if served and not work.sends_weights:
        return Span(*(2 * push_bytes(work) / rate for rate in reversed(DISK)))
    gathered = FLOAT * work.parameters * (ranks - 1) / ranks
    seconds = (push_bytes(work) if served else gathered) / gpu.network
    return Span(*(seconds / share for share in reversed(BANDWIDTH)))


@dataclass(frozen=True)
class Split:
    """The GPUs of a cluster divided into those that train and those that generate."""

    trainers: int
    generators: int
    """GPUs that only generate. With 0, all GPUs generate and train in turn."""
    step: Span
    generation: Span
    update: Span
    push: Span
    """Until the generators have new weights."""
    staleness: int
    binds: str
    """What limits the step's time."""
    copies: Copies


def splits(work: Workload, cluster: Cluster) -> Iterator[Split]:
    """Yield every way to divide the GPUs that fits: all in turn first, then side by side."""
    for generators in range(cluster.count):
        try:
            split = _split(work, cluster, generators)
        except CannotFit:
            continue
        if split is not None:
            yield split


def _split(work: Workload, cluster: Cluster, generators: int) -> Split | None:
    """Return the split with so many generators, None where training does not fit. Raises
    `CannotFit` where generation does not."""
    gpu, trainers = cluster.gpu, cluster.count - generators
    work = work.on(gpu, trainers)
    memory = training_memory(work, trainers, meanwhile=generators > 0)
    if max(sum(memory.values()), load_peak(work, trainers)) > gpu.memory * (1 - RESERVED):
        return None
    taken = 0.0 if generators else memory_between_updates(memory, work)
    generation, binds, copies = generating(
        work, gpu, generators or cluster.count, taken, in_turn=not generators
    )
    update = training(work, gpu, trainers)
    served = generators > 0 or work.served
    push = pushing(work, trainers, gpu, served)
    step = (generation.max(update) if generators else generation + update) + push
    if generation.best <= update.best:
        binds = "training's compute"
    if push.middle > max(generation.middle, update.middle):
        binds = "the way of new weights"
    staleness = int(generators > 0)
    return Split(trainers, generators, step, generation, update, push, staleness, binds, copies)


@dataclass(frozen=True)
class ClusterPlan:
    """The fastest split of a cluster for a run, and what it takes."""

    work: Workload
    cluster: Cluster
    best: Split
    in_turn: Split | None
    """The split in which all GPUs generate and train in turn; None where it does not fit."""
    memory: dict[str, float]
    """Bytes on each GPU that trains, by role."""
    load: float
    """Bytes on each GPU that trains, at the peak of loading."""
    push_bytes: float
    gpu_hours: Span
    tokens_that_fit: int
    """Tokens of the largest micro-batch that fits."""


def plan_cluster(config: Config, cluster: Cluster) -> ClusterPlan:
    """Return the fastest split of a cluster. Raises `CannotFit` with what is missing."""
    work = workload(config)
    feasible = list(splits(work, cluster))
    if not feasible:
        raise CannotFit("\n".join(_missing(work, cluster)))
    best = min(feasible, key=lambda split: split.step.middle)
    work = work.on(cluster.gpu, best.trainers)
    memory = training_memory(work, best.trainers, meanwhile=best.generators > 0)
    room = cluster.gpu.memory * (1 - RESERVED)
    hours = [
        config.run.steps * seconds * cluster.count / 3600
        for seconds in (best.step.best, best.step.worst)
    ]
    return ClusterPlan(
        work,
        cluster,
        best,
        next((split for split in feasible if not split.generators), None),
        memory,
        load_peak(work, best.trainers),
        push_bytes(work) if best.generators or work.served else 0.0,
        Span(*hours),
        tokens_that_fit(work, best.trainers, room, meanwhile=best.generators > 0),
    )


def _missing(work: Workload, cluster: Cluster) -> Iterator[str]:
    """Yield sentences on the memory that is missing if all GPUs train."""
    work = work.on(cluster.gpu, cluster.count)
    memory, room = training_memory(work, cluster.count), cluster.gpu.memory * (1 - RESERVED)
    total, load = sum(memory.values()), load_peak(work, cluster.count)
    if total > room:
        yield (
            f"training needs {total / GB:,.1f} GB on each of {cluster.name}, {room / GB:,.1f} GB "
            f"are usable: {(total - room) / GB:,.1f} GB are missing."
        )
        yield from (f"  {role}: {size / GB:,.1f} GB" for role, size in memory.items() if size)
        if not work.checkpointing:
            yield (
                "  policy.gradient_checkpointing = true would take a third more time, and a "
                "fraction of the activations."
            )
    elif load > room:
        yield (
            f"loading needs {load / GB:,.1f} GB on each of {cluster.name}, {room / GB:,.1f} GB are "
            f"usable: {(load - room) / GB:,.1f} GB are missing."
        )
    else:
        try:
            generating(
                work, cluster.gpu, cluster.count, memory_between_updates(memory, work), in_turn=True
            )
        except CannotFit as error:
            yield str(error)


def figures(plan: ClusterPlan) -> dict[str, Any]:
    """Return the plan's figures by name: bytes, or the best and worst seconds."""
    best = plan.best
    spans = {
        "step_seconds": best.step,
        "generation_seconds": best.generation,
        "update_seconds": best.update,
        "push_seconds": best.push,
        "gpu_hours": plan.gpu_hours,
    }
    numbers: dict[str, Any] = {name: [span.best, span.worst] for name, span in spans.items()}
    if plan.in_turn is not None:
        numbers["step_in_turn_seconds"] = [plan.in_turn.step.best, plan.in_turn.step.worst]
    return numbers | {
        "memory_of_training": plan.memory,
        "memory_of_generation": best.copies.memory,
        "memory_of_loading": plan.load,
        "micro_batch_tokens": plan.work.micro_tokens,
        "micro_batch_tokens_that_fit": plan.tokens_that_fit,
        "push_bytes": plan.push_bytes,
    }


def as_json(plan: ClusterPlan) -> dict[str, Any]:
    """Return the plan for `--json`; `never_measured_on_a_gpu` names the figures that were not."""
    best, numbers = plan.best, figures(plan)
    return {
        "cluster": plan.cluster.name,
        "trainers": best.trainers,
        "generators": best.generators,
        "staleness": best.staleness,
        "bottleneck": best.binds,
        "copies": {"count": best.copies.count, "gpus": best.copies.each, "rows": best.copies.rows},
        "figures": numbers,
        "never_measured_on_a_gpu": [name for name in numbers if name not in MEASURED],
    }


def in_words(plan: ClusterPlan) -> Iterator[str]:
    """Yield the plan as lines for a terminal, one fact in each, and last what the marks mean."""
    best, copies = plan.best, plan.best.copies
    division = f"all {best.trainers} GPUs, in turn"
    if best.generators:
        division = f"{best.trainers} GPUs train, {best.generators} generate"
    yield f"cluster {plan.cluster.name}: {division}; staleness {best.staleness}; {best.binds} binds"
    yield (
        f"step    {marked('step_seconds', str(best.step))}: generation "
        f"{marked('generation_seconds', str(best.generation))}, update "
        f"{marked('update_seconds', str(best.update))}, new weights "
        f"{marked('push_seconds', str(best.push))}"
    )
    if plan.in_turn is not None and best.generators:
        turn = marked("step_in_turn_seconds", str(plan.in_turn.step))
        yield f"        in turn on all GPUs: {turn}"
    yield from _memory_lines(plan)
    tokens = marked("micro_batch_tokens_that_fit", f"{plan.tokens_that_fit:,}")
    yield (
        f"        a micro-batch has {plan.work.micro_tokens:,} tokens, and may hold {tokens}; the "
        f"largest unit put together is {FLOAT * plan.work.unit / GB:,.2f} GB"
    )
    yield (
        f"        {copies.count} copies of the weights over {copies.each} GPUs each, "
        f"{copies.rows} answers at once by each"
    )
    if plan.push_bytes:
        size = marked("push_bytes", f"{plan.push_bytes / GB:,.1f} GB")
        yield f"push    {size} {'over NCCL' if plan.work.sends_weights else 'through a folder'}"
    hours = f"{plan.gpu_hours.best:,.1f} to {plan.gpu_hours.worst:,.1f} GPU-hours"
    yield f"in all  {marked('gpu_hours', hours)}"
    yield f"        {LEGEND}"


def _memory_lines(plan: ClusterPlan) -> Iterator[str]:
    """Yield the memory on each GPU, by role."""
    gpu = plan.cluster.gpu

    def line(figure: str, role: str, size: float, which: str) -> str:
        words = marked(figure, f"{size / GB:>8,.2f} GB")
        return f"memory  {role:<26} {words} of {gpu.memory / GB:,.0f} on each GPU {which}"

    for role, size in plan.memory.items():
        if size:
            yield line("memory_of_training", role, size, "that trains")
    yield line("memory_of_loading", "peak of loading", plan.load, "that trains")
    for role, size in plan.best.copies.memory.items():
        if size:
            yield line("memory_of_generation", role, size, "that generates")
