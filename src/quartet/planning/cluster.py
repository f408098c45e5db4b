"""What an RL run would take on a cluster: memory by role, seconds by phase, and what limits them.
docs/scaling.md has the formulas.

Nothing here was measured on the machines in question. Their numbers are the makers', the share of
them that is reached is given as a range, and so is every estimate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from quartet.config.tables import Config, SharedCritic
from quartet.planning.hardware import (
    BANDWIDTH,
    COMPUTE,
    GB,
    HOST,
    RESERVED,
    CannotFit,
    Cluster,
    Gpu,
    Span,
)
from quartet.planning.memory import (
    FLOAT,
    Sizes,
    activation_bytes,
    policy_parameters,
    sizes,
    trained_bytes,
)
from quartet.planning.plan import row_tokens, vocabulary


@dataclass(frozen=True)
class Workload:
    """What an RL step computes, as far as memory and time depend on it."""

    parameters: int
    """Parameters of the policy; every other model has as many."""
    model: Sizes
    beside: int
    """Parameters outside the blocks: embeddings and head."""
    learners: int
    """Models that are trained: 2 with a separate critic, else 1."""
    frozen: int
    """Models that are only read: the reference, reward models."""
    rows: int
    """Responses of a step."""
    prompt: float
    """Tokens of a prompt on average."""
    response: float
    """Tokens of a response on average."""
    longest: int
    """Tokens of the longest response."""
    epochs: int
    micro_tokens: int
    """Tokens of a micro-batch."""
    checkpointing: bool
    offload: bool = False
    """Whether frozen models and moments are kept in main memory while they are not needed."""
    read_by_loss: int = 0
    """The number of frozen models that an update reads."""
    reward_models: int = 0
    """The number of frozen models that score rollouts, which can go on during an update."""
    trained_bytes: float = 16.0
    """Bytes for each parameter that is trained: itself and its gradient in float32, and the moments
    that the optimizer keeps; 8 are AdamW's two."""

    @property
    def unit(self) -> float:
        """Parameters of the largest unit that FSDP gathers at once: a block, or what is outside the
        blocks."""
        return float(max((self.parameters - self.beside) / max(self.model.layers, 1), self.beside))

    @property
    def cache_bytes(self) -> float:
        """Bytes of the keys and values of one token, in bf16."""
        return 2 * self.model.layers * self.model.hidden * self.model.heads_share * 2


def workload(config: Config) -> Workload:
    """Return the workload of a config's RL stage. Raises ValueError where there is none, or where
    the size of the policy is not known."""
    parameters, model = policy_parameters(config, vocabulary(config)), sizes(config)
    if not parameters or not model or not config.algorithm:
        raise ValueError(
            "the size of the policy is not known, or there is no RL stage: name a folder, or "
            "describe it in policy.create."
        )
    algorithm, (prompt, response) = config.algorithm, row_tokens(config)
    own_critic = algorithm.needs_critic and not isinstance(config.critic, SharedCritic)
    members = max(len(config.reward_models), 1)
    reward_models = members if config.reward_model_source is not None else 0
    return Workload(
        parameters=parameters,
        model=model,
        beside=max(int(parameters - model.matrix_parameters), 0),
        learners=1 + own_critic,
        frozen=reward_models + algorithm.needs_reference,
        rows=config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
        prompt=prompt,
        response=response,
        longest=config.rollout.max_new_tokens,
        epochs=config.optim.epochs,
        micro_tokens=int(config.optim.micro_batch_tokens)
        if config.optim.micro_batch_tokens != "auto"
        else 8192,
        checkpointing=config.policy.gradient_checkpointing,
        offload=config.run.offload,
        read_by_loss=int(algorithm.needs_reference and algorithm.kl.exact_loss),
        reward_models=reward_models,
        trained_bytes=trained_bytes(config.optim.optimizer, model, parameters) / parameters,
    )


# --- memory


def training_memory(work: Workload, ranks: int, meanwhile: bool = False) -> dict[str, float]:
    """Return the bytes on each GPU that trains, by role.

    A trained parameter takes `Workload.trained_bytes` and a frozen one 4, divided by the ranks. The
    largest unit (`Workload.unit`) is gathered whole, weights and gradient. `meanwhile` says that
    other GPUs generate during the update, so that reward models are in use as well.
    """
    sharded = work.parameters / ranks
    roles = {"actor": work.trained_bytes * sharded}
    if work.learners > 1:
        roles["critic"] = work.trained_bytes * sharded
    on_device = work.read_by_loss + work.reward_models * meanwhile if work.offload else work.frozen
    if on_device:
        roles["reference, reward model"] = FLOAT * sharded * on_device
    roles["put together"] = 2 * FLOAT * work.unit * (ranks > 1)
    roles["activations"] = work.micro_tokens * activation_bytes(work.model, work.checkpointing)
    return roles


@dataclass(frozen=True)
class Copies:
    """The copies of the weights on the GPUs that generate."""

    count: int
    each: int
    """GPUs that one copy is divided over."""
    rows: int
    """Responses that each copy samples at once."""
    memory: dict[str, float]
    """Bytes on each GPU, by role."""


def generation_memory(work: Workload, gpu: Gpu, count: int, taken: float = 0.0) -> list[Copies]:
    """Return every way to divide `count` GPUs into copies that fits, with 1, 2, 4 or 8 GPUs each.

    A response holds the pages of the cache that it fills, which are its prompt and response on
    average. `taken` is the memory that training holds on the same GPU. Raises `CannotFit`.
    """
    room, weights = gpu.memory * (1 - RESERVED) - taken, 2.0 * work.parameters
    per_row = work.cache_bytes * (work.prompt + work.response)
    longest = work.cache_bytes * (work.prompt + work.longest)
    fitting = []
    for each in (1, 2, 4, HOST):
        copies = count // each
        if copies and (weights + longest) / each < 0.95 * room:
            rows = int(
                min((room - weights / each) / (per_row / each), math.ceil(work.rows / copies))
            )
            memory = {"weights": weights / each, "keys and values": rows * per_row / each}
            fitting.append(Copies(copies, each, max(rows, 1), memory))
    if not fitting:
        raise CannotFit(
            f"generation: {weights / GB:,.0f} GB of weights and {longest / GB:,.2f} GB for one "
            f"answer do not fit into {count} × {room / GB:,.0f} GB."
        )
    return fitting


# --- time


def generating(
    work: Workload, gpu: Gpu, count: int, taken: float = 0.0
) -> tuple[Span, str, Copies]:
    """Return the time to sample one step's responses on `count` GPUs, what limits it, and the
    copies of the weights with which it is shortest.

    A token of every row costs one reading of the weights and of the rows' keys and values, or its
    arithmetic, whichever is longer. A free slot takes the next response. The time is never less
    than that of the longest response.
    """
    ways = [
        (*_generating(work, gpu, count, copies), copies)
        for copies in generation_memory(work, gpu, count, taken)
    ]
    return min(ways, key=lambda way: way[0].middle)


def _generating(work: Workload, gpu: Gpu, count: int, copies: Copies) -> tuple[Span, str]:
    each, rows = copies.each, copies.rows
    turns = max(work.rows / (rows * copies.count), 1.0)
    read = (2.0 * work.parameters + rows * work.cache_bytes * (work.prompt + work.response / 2)) / (
        gpu.bandwidth * each
    )
    arithmetic = 2.0 * work.parameters * rows / (gpu.flops * each)
    prefill = 2.0 * work.parameters * work.rows * work.prompt / (gpu.flops * count)
    alone = 2.0 * work.parameters / (gpu.bandwidth * each)
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

    A trained parameter takes 6 operations per token and epoch, 8 with checkpointing. Every model
    takes 2 more, for the forward passes that score the responses.
    """
    tokens = work.rows * (work.prompt + work.response)
    trained = (8 if work.checkpointing else 6) * work.learners * work.epochs
    operations = work.parameters * tokens * (trained + 2 * (work.learners + work.frozen))
    return Span(*(operations / (gpu.flops * count * part) for part in reversed(COMPUTE)))


def pushing(work: Workload, gpu: Gpu) -> Span:
    """Return the time to send new weights to the generators, in bf16, over one GPU's network."""
    seconds = 2.0 * work.parameters / gpu.network
    return Span(seconds / BANDWIDTH[1], seconds / BANDWIDTH[0])


@dataclass(frozen=True)
class Split:
    """The GPUs of a cluster divided into those that train and those that generate."""

    trainers: int
    generators: int
    """GPUs that only generate. With 0, all GPUs generate and train in turn."""
    step: Span
    generation: Span
    update: Span
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
    memory = training_memory(work, trainers, meanwhile=generators > 0)
    if sum(memory.values()) > gpu.memory * (1 - RESERVED):
        return None
    taken = 0.0 if generators else memory_between_updates(memory, work)
    generation, binds, copies = generating(work, gpu, generators or cluster.count, taken)
    update = training(work, gpu, trainers)
    in_parallel = generation.max(update) + pushing(work, gpu)
    step = in_parallel if generators else generation + update
    if generation.best <= update.best:
        binds = "training's compute"
    staleness = int(generators > 0)
    return Split(trainers, generators, step, generation, update, staleness, binds, copies)


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
    memory = training_memory(work, best.trainers, meanwhile=best.generators > 0)
    left = cluster.gpu.memory * (1 - RESERVED) - sum(memory.values()) + memory["activations"]
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
        2.0 * work.parameters,
        Span(*hours),
        int(left / activation_bytes(work.model, work.checkpointing)),
    )


def memory_between_updates(memory: dict[str, float], work: Workload) -> float:
    """Return the bytes that training holds on a GPU between two updates. With `offload`, moments
    are in main memory: weights and gradients stay."""
    trained = 2 * FLOAT / work.trained_bytes if work.offload else 1.0
    return sum(
        size * (trained if role in {"actor", "critic"} else 1.0)
        for role, size in memory.items()
        if role not in {"activations", "put together"}
    )


def _missing(work: Workload, cluster: Cluster) -> Iterator[str]:
    """Yield sentences on the memory that is missing if all GPUs train."""
    memory, room = training_memory(work, cluster.count), cluster.gpu.memory * (1 - RESERVED)
    total = sum(memory.values())
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
    else:
        try:
            generation_memory(work, cluster.gpu, cluster.count)
        except CannotFit as error:
            yield str(error)


def in_words(plan: ClusterPlan) -> Iterator[str]:
    """Yield the plan as lines for a terminal, one fact in each."""
    best, gpu, copies = plan.best, plan.cluster.gpu, plan.best.copies
    division = f"all {best.trainers} GPUs, in turn"
    if best.generators:
        division = f"{best.trainers} GPUs train, {best.generators} generate"
    yield f"cluster {plan.cluster.name}: {division}; staleness {best.staleness}; {best.binds} binds"
    yield f"step    {best.step}: generation {best.generation}, update {best.update}"
    if plan.in_turn is not None and best.generators:
        yield f"        in turn on all GPUs: {plan.in_turn.step}"
    for role, size in plan.memory.items():
        if size:
            yield f"{_memory_line(role, size, gpu)} that trains"
    yield (
        f"        a micro-batch may hold {plan.tokens_that_fit:,} tokens; the largest unit put "
        f"together is {FLOAT * plan.work.unit / GB:,.2f} GB"
    )
    for role, size in copies.memory.items():
        yield f"{_memory_line(role, size, gpu)} that generates"
    yield (
        f"        {copies.count} copies of the weights over {copies.each} GPUs each, "
        f"{copies.rows} answers at once by each"
    )
    yield f"push    {plan.push_bytes / GB:,.1f} GB, {pushing(plan.work, gpu)}"
    yield f"in all  {plan.gpu_hours.best:,.1f} to {plan.gpu_hours.worst:,.1f} GPU-hours"


def _memory_line(role: str, size: float, gpu: Gpu) -> str:
    return f"memory  {role:<26} {size / GB:>8,.2f} GB of {gpu.memory / GB:,.0f} on each GPU"
