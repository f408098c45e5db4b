"""What a run would take on a cluster: memory by role, seconds by phase, and what binds them.
Formulas: docs/scaling.md.

Nothing here was measured on the machines it speaks of: their numbers are the makers', what part of
them is reached is given as a range, and so is every answer.
"""

import heapq
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from quartet.config.tables import Config, SharedCritic
from quartet.errors import QuartetError
from quartet.planning.memory import FLOAT, Sizes, activation_bytes, policy_parameters, sizes
from quartet.planning.plan import row_tokens, vocabulary

TRAINED_BYTES = 16
"""Per parameter that is trained: itself, its gradient and Adam's two moments, in float32."""
COMPUTE = (0.25, 0.5)
"""The part of the makers' dense bf16 rate that training and reading reach: from, to."""
BANDWIDTH = (0.5, 0.85)
"""The part of the memory's bandwidth that decoding reaches."""
HOST = 8
"""GPUs that are near enough to each other to hold one copy together."""
RESERVED = 0.1
"""Of a GPU's memory, for kernels, communication and what cannot be joined."""
GB = 1e9


@dataclass(frozen=True)
class Gpu:
    memory: float
    """Bytes."""
    flops: float
    """Dense bf16, per second."""
    bandwidth: float
    """Of its memory, bytes per second."""
    network: float = 50 * GB
    """To other hosts, bytes per second and GPU: 400 Gbit/s."""


GPUS = {
    "a100": Gpu(80 * GB, 312e12, 2039 * GB, 25 * GB),
    "h100": Gpu(80 * GB, 989e12, 3350 * GB),
    "h200": Gpu(141 * GB, 989e12, 4800 * GB),
    "b200": Gpu(192 * GB, 2250e12, 8000 * GB),
    "l40s": Gpu(48 * GB, 362e12, 864 * GB, 12.5 * GB),
    "rtx4090": Gpu(24 * GB, 165e12, 1008 * GB, 3 * GB),
}
"""By the makers' data sheets."""


class CannotFit(QuartetError, ValueError):
    """The message says by how much, role by role."""


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    count: int
    name: str

    @classmethod
    def of(cls, words: str) -> "Cluster":
        """`8xh200`."""
        found = re.fullmatch(r"(\d+)\s*[x×]\s*(\w+)", words.strip().lower())
        if found is None or found[2] not in GPUS or int(found[1]) < 1:
            raise ValueError(
                f'--on "{words}": say how many of which, "8xh200". Known are {", ".join(GPUS)}.'
            )
        return cls(GPUS[found[2]], int(found[1]), words)


@dataclass(frozen=True)
class Span:
    """Seconds, from the best to the worst that one should expect."""

    best: float
    worst: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.best + other.best, self.worst + other.worst)

    def most(self, other: "Span") -> "Span":
        """Both at once: the longer counts."""
        return Span(max(self.best, other.best), max(self.worst, other.worst))

    def __str__(self) -> str:
        return (
            f"{self.best:,.2g} to {self.worst:,.2g} s"
            if self.worst < 100
            else f"{self.best:,.0f} to {self.worst:,.0f} s"
        )


@dataclass(frozen=True)
class Workload:
    """An RL step, in the numbers that decide."""

    parameters: int
    model: Sizes
    beside: int
    """Parameters that are in no block: embeddings and head."""
    learners: int
    """Models that are trained: 2 with a critic of its own."""
    frozen: int
    """Others that are only read: the reference, reward models."""
    rows: int
    prompt: float
    response: float
    longest: int
    epochs: int
    micro_tokens: int
    checkpointing: bool
    offload: bool = False
    """Frozen models, and moments, are elsewhere when nobody works with them."""
    read_by_loss: int = 0
    """Of the frozen, those that an update reads."""
    judges: int = 0
    """Of the frozen, those that rollouts are scored with, which may be at the same time."""

    @property
    def unit(self) -> float:
        """The largest that is put together: a block, or what is beside them."""
        return float(max((self.parameters - self.beside) / max(self.model.layers, 1), self.beside))

    @property
    def cache_bytes(self) -> float:
        """Keys and values of one token, in bf16."""
        return 2 * self.model.layers * self.model.hidden * self.model.heads_share * 2


def workload(config: Config) -> Workload:
    """Of a config whose policy's size is known."""
    words = vocabulary(config)
    parameters, model = policy_parameters(config, words), sizes(config)
    if not parameters or not model or not config.algorithm:
        raise ValueError(
            "the size of the policy is not known, or there is no RL stage: name a folder, or "
            "describe it in policy.create."
        )
    algorithm, (prompt, response) = config.algorithm, row_tokens(config)
    own_critic = algorithm.needs_critic and not isinstance(config.critic, SharedCritic)
    judges = int(bool(config.reward_model_source))
    per_block = (
        2 + 2 * model.heads_share
    ) * model.hidden**2 + 3 * model.hidden * model.intermediate
    return Workload(
        parameters=parameters,
        model=model,
        beside=max(int(parameters - model.layers * per_block), 0),
        learners=1 + own_critic,
        frozen=judges + algorithm.needs_reference,
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
        judges=judges,
    )


# --- memory
# ----------------------------------------------------------------------------------------------------------------


def training_memory(work: Workload, ranks: int, meanwhile: bool = False) -> dict[str, float]:
    """Bytes on each GPU that trains, by role: 16 per parameter over the ranks, 4 of frozen models;
    of the largest unit, a block or what is beside them, weights and gradient put together; the
    activations of a micro-batch. `meanwhile`: while others generate."""
    sharded = work.parameters / ranks
    roles = {"actor": TRAINED_BYTES * sharded}
    if work.learners > 1:
        roles["critic"] = TRAINED_BYTES * sharded
    there = work.read_by_loss + work.judges * meanwhile if work.offload else work.frozen
    if there:
        roles["reference, reward model"] = FLOAT * sharded * there
    roles["put together"] = 2 * FLOAT * work.unit * (ranks > 1)
    roles["activations"] = work.micro_tokens * activation_bytes(work.model, work.checkpointing)
    return roles


@dataclass(frozen=True)
class Copies:
    """How the GPUs that generate hold the weights."""

    count: int
    each: int
    """GPUs that one copy is divided over."""
    rows: int
    """Answers that are written at once by each copy."""
    memory: dict[str, float]
    """Bytes on each GPU, by role."""


def generation_memory(work: Workload, gpu: Gpu, count: int, taken: float = 0.0) -> list[Copies]:
    """Every way that fits. An answer holds the pages that it fills: on average its prompt and
    response. `taken`: what training leaves on the same GPU."""
    room, weights = gpu.memory * (1 - RESERVED) - taken, 2.0 * work.parameters
    per_row = work.cache_bytes * (work.prompt + work.response)
    longest = work.cache_bytes * (work.prompt + work.longest)
    found = []
    for each in (1, 2, 4, HOST):
        copies = count // each
        if copies and (weights + longest) / each < 0.95 * room:
            rows = int(
                min((room - weights / each) / (per_row / each), math.ceil(work.rows / copies))
            )
            memory = {"weights": weights / each, "keys and values": rows * per_row / each}
            found.append(Copies(copies, each, max(rows, 1), memory))
    if not found:
        raise CannotFit(
            f"generation: {weights / GB:,.0f} GB of weights and {longest / GB:,.2f} GB for one "
            f"answer do not fit into "
            f"{count} × {room / GB:,.0f} GB."
        )
    return found


# --- time
# ------------------------------------------------------------------------------------------------------------------


def generating(
    work: Workload, gpu: Gpu, count: int, taken: float = 0.0
) -> tuple[Span, str, Copies]:
    """Seconds to sample one step's answers on so many GPUs, what binds, and the copies with which
    it is shortest: a token of every row costs one reading of the weights and of the rows' keys and
    values, or its arithmetic, whichever is longer. A slot that is free is given the next answer.
    Never less than the longest answer."""
    made = [
        (*_generating(work, gpu, count, copies), copies)
        for copies in generation_memory(work, gpu, count, taken)
    ]
    return min(made, key=lambda one: one[0].best + one[0].worst)


def _generating(work: Workload, gpu: Gpu, count: int, copies: Copies) -> tuple[Span, str]:
    each, rows = copies.each, copies.rows
    turns = max(work.rows / (rows * copies.count), 1.0)
    read = (2.0 * work.parameters + rows * work.cache_bytes * (work.prompt + work.response / 2)) / (
        gpu.bandwidth * each
    )
    reckoned = 2.0 * work.parameters * rows / (gpu.flops * each)
    prefill = 2.0 * work.parameters * work.rows * work.prompt / (gpu.flops * count)
    alone = 2.0 * work.parameters / (gpu.bandwidth * each)
    spans = []
    for compute, bandwidth in zip(reversed(COMPUTE), reversed(BANDWIDTH), strict=True):
        token = max(read / bandwidth, reckoned / compute)
        tail = (
            (work.longest - work.response) * alone / bandwidth
        )  # few rows are left when the longest is written
        spans.append(turns * work.response * token + tail + prefill / compute)
    binds = "bandwidth" if read / BANDWIDTH[1] > reckoned / COMPUTE[1] else "compute"
    tail = (work.longest - work.response) * alone / BANDWIDTH[1]
    return Span(*spans), "the longest answer" if tail > spans[0] / 2 else binds


def training(work: Workload, gpu: Gpu, count: int) -> Span:
    """6 operations per trained parameter and token and epoch, 8 with checkpointing; 2 for each
    model that only reads."""
    tokens = work.rows * (work.prompt + work.response)
    trained = (8 if work.checkpointing else 6) * work.learners * work.epochs
    operations = work.parameters * tokens * (trained + 2 * (work.learners + work.frozen))
    return Span(*(operations / (gpu.flops * count * part) for part in reversed(COMPUTE)))


def pushing(work: Workload, gpu: Gpu) -> Span:
    """New weights to the generators, in bf16, over one GPU's network."""
    seconds = 2.0 * work.parameters / gpu.network
    return Span(seconds / BANDWIDTH[1], seconds / BANDWIDTH[0])


@dataclass(frozen=True)
class Split:
    """Who does what: all in turn where nobody generates only."""

    trainers: int
    generators: int
    step: Span
    generation: Span
    update: Span
    staleness: int
    binds: str
    copies: Copies


def splits(work: Workload, cluster: Cluster) -> Iterator[Split]:
    """Every way to divide the GPUs that fits: in turn on all, or side by side."""
    gpu, count = cluster.gpu, cluster.count
    for generators in range(count):
        trainers = count - generators
        sampling, memory = (
            generators or count,
            training_memory(work, trainers, meanwhile=generators > 0),
        )
        if sum(memory.values()) > gpu.memory * (1 - RESERVED):
            continue
        try:
            made, binds, copies = generating(
                work, gpu, sampling, 0.0 if generators else _at_rest(memory, work.offload)
            )
        except CannotFit:
            continue
        update = training(work, gpu, trainers)
        if generators:
            step, staleness = made.most(update) + pushing(work, gpu), 1
        else:
            step, staleness = made + update, 0
        binds = binds if made.best > update.best else "training's compute"
        yield Split(trainers, generators, step, made, update, staleness, binds, copies)


@dataclass(frozen=True)
class ClusterPlan:
    work: Workload
    cluster: Cluster
    best: Split
    in_turn: Split | None
    memory: dict[str, float]
    push_bytes: float
    gpu_hours: Span
    tokens_that_fit: int


def plan_cluster(config: Config, cluster: Cluster) -> ClusterPlan:
    """The fastest split. Raises `CannotFit` with what is short."""
    work = workload(config)
    found = list(splits(work, cluster))
    if not found:
        raise CannotFit("\n".join(_short(work, cluster)))
    best = min(found, key=lambda split: split.step.best + split.step.worst)
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
        next((split for split in found if not split.generators), None),
        memory,
        2.0 * work.parameters,
        Span(*hours),
        int(left / activation_bytes(work.model, work.checkpointing)),
    )


def _at_rest(memory: dict[str, float], offload: bool) -> float:
    """What a rank holds between two updates. Of what is trained, half are moments."""
    trained = 0.5 if offload else 1.0
    return sum(
        size * (trained if role in {"actor", "critic"} else 1.0)
        for role, size in memory.items()
        if role not in {"activations", "put together"}
    )


def _short(work: Workload, cluster: Cluster) -> Iterator[str]:
    """By how much it does not fit, if all GPUs train."""
    memory, room = training_memory(work, cluster.count), cluster.gpu.memory * (1 - RESERVED)
    total = sum(memory.values())
    if total > room:
        yield (
            f"training needs {total / GB:,.1f} GB on each of {cluster.name}, {room / GB:,.1f} GB "
            f"are usable: "
            f"{(total - room) / GB:,.1f} GB are missing."
        )
        yield from (f"  {role}: {size / GB:,.1f} GB" for role, size in memory.items() if size)
        if not work.checkpointing:
            yield "  policy.gradient_checkpointing = true would take a third more time, and a fraction of the activations."
    else:
        try:
            generation_memory(work, cluster.gpu, cluster.count)
        except CannotFit as short:
            yield str(short)


def in_words(plan: ClusterPlan) -> Iterator[str]:
    """A line per fact."""
    best, gpu = plan.best, plan.cluster.gpu
    how = (
        f"{best.trainers} GPUs train, {best.generators} generate"
        if best.generators
        else f"all {best.trainers} GPUs, in turn"
    )
    yield f"cluster {plan.cluster.name}: {how}; staleness {best.staleness}; {best.binds} binds"
    yield f"step    {best.step}: generation {best.generation}, update {best.update}"
    if plan.in_turn is not None and best.generators:
        yield f"        in turn on all GPUs: {plan.in_turn.step}"
    for role, size in plan.memory.items():
        if size:
            yield f"memory  {role:<26} {size / GB:>8,.2f} GB of {gpu.memory / GB:,.0f} on each GPU that trains"
    unit = FLOAT * plan.work.unit / GB
    yield f"        a micro-batch may hold {plan.tokens_that_fit:,} tokens; the largest unit put together is {unit:,.2f} GB"
    for role, size in best.copies.memory.items():
        yield f"memory  {role:<26} {size / GB:>8,.2f} GB of {gpu.memory / GB:,.0f} on each GPU that generates"
    held = best.copies
    yield f"        {held.count} copies of the weights over {held.each} GPUs each, {held.rows} answers at once by each"
    yield f"push    {plan.push_bytes / GB:,.1f} GB, {pushing(plan.work, gpu)}"
    yield f"in all  {plan.gpu_hours.best:,.1f} to {plan.gpu_hours.worst:,.1f} GPU-hours"


# --- simulation
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """What came out."""

    steps: int
    seconds: float
    """Per step, once it has settled."""
    staleness: list[int] = field(repr=False)
    """Of each answer that was trained on, in updates."""
    trainer_idle: float
    generators_idle: float


def simulate(
    slots: int,
    mean_seconds: float,
    spread: float,
    rows: int,
    update: float,
    push: float,
    bound: int,
    steps: int,
    seed: int = 0,
) -> Simulated:
    """Answers that take as long as they take (log-normal with this mean and spread of the
    logarithm), written in `slots` at once; a trainer that takes `rows` at a time, in the order in
    which they were begun. An answer is only begun if it will be trained on no more than `bound`
    updates later; until then its slot waits. `push` holds up every slot."""
    rng = random.Random(seed)
    shift = math.log(mean_seconds) - spread**2 / 2

    def duration() -> float:
        return math.exp(rng.gauss(shift, spread)) if spread else mean_seconds

    writing: list[
        tuple[float, int, int]
    ] = []  # when it will be done, its number, the version that began it
    ready: dict[int, int] = {}  # the version that began each
    begun, version, now, busy, waited = 0, 0, 0.0, 0.0, 0.0
    ages: list[int] = []
    ends: list[float] = []

    def begin(at: float) -> None:
        """As many as may be: number n is trained on in step n // rows, by the version of that
        number."""
        nonlocal begun, busy
        while len(writing) < slots and begun // rows <= version + bound and begun < rows * steps:
            took = duration()
            busy += took
            heapq.heappush(writing, (at + took, begun, version))
            begun += 1

    begin(0.0)
    while version < steps:
        batch = range(rows * version, rows * (version + 1))
        missing = sum(number not in ready for number in batch)
        while missing:
            done, number, made_by = heapq.heappop(writing)
            if done > now:
                waited, now = waited + done - now, done
            ready[number] = made_by
            missing -= number in batch
            begin(now)
        ages += [version - ready.pop(number) for number in batch]
        end = now + update
        while writing and writing[0][0] <= end:  # slots go on while the trainer works
            done, number, made_by = heapq.heappop(writing)
            ready[number] = made_by
            begin(max(done, now))
        now, version = end + push, version + 1
        writing = [(done + push, number, made_by) for done, number, made_by in writing]
        heapq.heapify(writing)
        begin(now)
        ends.append(now)
    first, last = (
        len(ends) // 2,
        max(9 * len(ends) // 10, 1) - 1,
    )  # neither while it fills nor while it empties
    seconds = (ends[last] - ends[first]) / (last - first) if last > first else ends[-1] / len(ends)
    return Simulated(steps, seconds, ages, waited / now, max(1 - busy / (slots * now), 0.0))


def simulated(plan: ClusterPlan, bound: int, steps: int = 200, seed: int = 0) -> Simulated:
    """The plan's split, with answers whose lengths vary: the logarithm's spread is 0.8."""
    split, work = plan.best, plan.work
    slots = min(split.copies.rows * split.copies.count, work.rows * max(bound, 1))
    middle = (split.generation.best + split.generation.worst) / 2
    per_answer = middle * slots / work.rows
    update = (split.update.best + split.update.worst) / 2
    push = pushing(work, plan.cluster.gpu).best
    return simulate(slots, per_answer, 0.8, work.rows, update, push, bound, steps, seed)
