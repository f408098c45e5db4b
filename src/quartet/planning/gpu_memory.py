"""The memory that an RL run takes on each GPU of a cluster, by role.

Weights, gradients, moments, activations, the decoder and its cache are compared in tests with the
bytes that the program allocates on a device that is only pretended. What FSDP gathers and what
CUDA graphs hold is not in these counts, and none of it was measured on a GPU.
"""

import dataclasses
import math
from dataclasses import dataclass

from quartet.config.tables import Config, SharedCritic
from quartet.generation.source import Servers
from quartet.planning.hardware import GB, HOST, RESERVED, CannotFit, Gpu
from quartet.planning.memory import (
    CPU_MICRO_BATCH,
    FLOAT,
    NF4_BYTES,
    Sizes,
    activation_bytes,
    adapter_parameters,
    folder_sizes,
    micro_batch_on_cpu,
    number_bytes,
    policy_parameters,
    reference_share,
    reward_model_parameters,
    row_cache_bytes,
    sizes,
    trained_bytes,
)
from quartet.planning.plan import row_tokens, vocabulary
from quartet.training.optimizer_types import OptimizerType

SHARE, MOST_TOKENS = 0.5, 2**16
"""The share of the memory that is left which a micro-batch that the program chooses may take, and
the most tokens that it has."""
SAMPLING_COPIES = 7.0
"""Numbers of 4 bytes that drawing a token holds at once for each row and word of the vocabulary.
Counted."""
HEAD_COPIES, EXACT_KL_COPIES = 3.0, 4.0
"""The same for a chunk of the logits of a micro-batch in a forward pass, and where the loss has the
exact KL from the reference. Counted."""
HEAD_COPIES_BACKWARD = {2: 2.5, FLOAT: 3.0}
"""The same in a backward pass, by the bytes of a number. Counted."""
EMBEDDING_COPIES = {2: 1.5, FLOAT: 1.0}
"""Numbers of 4 bytes for each weight of the embeddings while their gradient is computed: it is
there in the dtype that the model computes in, and in float32. Counted."""
TIED_COPIES = 3.0
"""The same where the head is the embeddings: its gradient, theirs, and the sum of both. Counted."""
HEAD_CHUNKS, CHUNK_ELEMENTS = 8, 2**21
"""Log-probs are computed in at most so many chunks of the vocabulary, of at least so many logits
(`models/logprobs.py`)."""
CACHE_COLUMNS, CACHE_SLOTS, LOOK_AHEAD = 256, 8, 8
"""A decoder's cache has a power of two times so many columns and slots, and room for the tokens of
rows whose end was not seen yet (`generation/slots.py`)."""


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
    frozen: int | float
    """Models that are only read: the reference, reward models. Adapters on a trunk are none, and a
    reference of another size counts by its size over the policy's."""
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
    read_by_loss: int | float = 0
    """The frozen models that an update reads, counted as `frozen` is."""
    exact_kl: bool = False
    """Whether the loss has the exact KL, and the logits of two models meet in it."""
    reward_models: int = 0
    """The number of frozen models that score rollouts, which can go on during an update."""
    trained_bytes: float = 16.0
    """Bytes for each parameter that is trained: itself and its gradient in float32, and the moments
    that the optimizer keeps; 8 are AdamW's two."""
    number: int = 2
    """Bytes of a number that models compute with: 2 in bfloat16, 4 in float32. Frozen models are
    held in it."""
    vocabulary: int = 0
    """Words that a token is drawn from."""
    adapter: int | None = None
    """Parameters of one adapter; None where all weights are trained."""
    in_4_bits: bool = False
    """Whether the trunk under the adapters is held in NF4."""
    served: bool = False
    """Whether servers generate the responses, which may divide a model over several GPUs."""
    sends_weights: bool = False
    """Whether they are sent new weights over the network, in place of a folder."""
    config: Config | None = None
    """The settings, where the program chooses the tokens of a micro-batch by the GPU's memory."""

    @property
    def unit(self) -> float:
        """Parameters of the largest unit that FSDP gathers at once: a block, or what is outside the
        blocks."""
        return float(max((self.parameters - self.beside) / max(self.model.layers, 1), self.beside))

    @property
    def embedding(self) -> int:
        """Parameters of the embeddings, which the head shares or has as many of."""
        return min(self.vocabulary * self.model.hidden, self.beside)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        return 2 * self.beside < 3 * self.embedding

    def row_bytes(self, tokens: int | float) -> float:
        """Return the bytes that a decoder's cache holds of a row of so many tokens."""
        return row_cache_bytes(self.model, tokens, self.number)

    @property
    def trained(self) -> int:
        """Parameters that each learner trains."""
        return self.parameters if self.adapter is None else self.adapter

    @property
    def trunk(self) -> float:
        """Bytes of the weights under adapters, 0 without any."""
        if self.adapter is None:
            return 0.0
        if not self.in_4_bits:
            return float(self.number * self.parameters)
        return NF4_BYTES * (self.parameters - self.beside) + self.number * self.beside

    def on(self, gpu: Gpu, ranks: int) -> "Workload":
        """Return the workload with the micro-batch that the program chooses on so many GPUs."""
        config = self.config
        if config is None or config.optim.micro_batch_tokens != "auto":
            return self
        launch = dataclasses.replace(config.launch, shard=ranks > 1)
        config = dataclasses.replace(config, launch=launch)
        tokens = micro_batch_tokens(config, gpu.memory, ranks)
        return dataclasses.replace(self, micro_tokens=tokens)


def workload(config: Config, words: int | None = None) -> Workload:
    """Return the workload of a config's RL stage on GPUs. Raises ValueError where there is none, or
    where the size of the policy is not known. `words` as in `stage_workload`."""
    base = stage_workload(config, words=words)
    if base is None or not config.algorithm:
        raise ValueError(
            "the size of the policy is not known, or there is no RL stage: name a folder, or "
            "describe it in policy.create."
        )
    algorithm = config.algorithm
    own_critic = algorithm.needs_critic and not isinstance(config.critic, SharedCritic)
    members = max(len(config.reward_models), 1)
    reward_models = members if config.reward_model_source is not None else 0
    if base.adapter is not None and config.reward_model.model is None and config.reward_models:
        reward_models = 0  # an adapter on the policy's trunk
    reference = _reference(config, base) if algorithm.needs_reference else 0.0
    return dataclasses.replace(
        base,
        learners=1 + own_critic,
        frozen=reward_models + reference,
        read_by_loss=reference * algorithm.kl.exact_loss,
        exact_kl=algorithm.kl.exact_loss,
        reward_models=reward_models,
    )


def _reference(config: Config, base: Workload) -> float:
    """Return the size of the reference over the policy's; 0 if it is the trunk under adapters."""
    if base.adapter is not None and config.reference.model is None:
        return 0.0
    return reference_share(config, base.parameters)


def stage_workload(
    config: Config, optimizer: OptimizerType | None = None, words: int | None = None
) -> Workload | None:
    """Return the workload of a stage that trains the policy alone, with an optimizer, the RL
    stage's if it is None. None where the size of the policy is not known. `words` is the size of
    the vocabulary; None takes what the config says."""
    words = words or vocabulary(config)
    parameters, model = policy_parameters(config, words), sizes(config)
    if not parameters or not model:
        return None
    prompt, response = row_tokens(config)
    adapter, tokens = adapter_parameters(config), config.optim.micro_batch_tokens
    beside = max(int(parameters - model.matrix_parameters), 0)
    trained = trained_bytes(optimizer or config.optim.optimizer, model, parameters, adapter)
    return Workload(
        parameters=parameters,
        model=model,
        beside=beside,
        learners=1,
        frozen=0,
        rows=config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
        prompt=prompt,
        response=response,
        longest=config.rollout.max_new_tokens,
        epochs=config.optim.epochs,
        micro_tokens=8192 if tokens == "auto" else tokens,
        checkpointing=config.policy.gradient_checkpointing,
        offload=config.run.offload,
        trained_bytes=trained / (parameters if adapter is None else adapter),
        number=number_bytes(config, on_gpu=True),
        vocabulary=words or model.vocabulary or beside // (2 * model.hidden),
        adapter=adapter,
        in_4_bits=config.policy.quantize is not None,
        served=isinstance(config.generator, Servers),
        sends_weights=isinstance(config.generator, Servers) and config.generator.sends_weights,
        config=config,
    )


def reward_model_workload(config: Config, base: Workload, scorer: int) -> Workload:
    """Return the workload of a reward model's stage, which holds the policy to be centred on its
    responses; an adapter shares the policy's trunk."""
    settings = config.reward_model
    if settings.model is None:
        work = stage_workload(config, settings.optimizer) or base
        return work if work.adapter is not None else dataclasses.replace(work, frozen=1)
    model = folder_sizes(settings.model) or base.model
    return dataclasses.replace(
        base,
        parameters=scorer,
        model=model,
        beside=max(int(scorer - model.matrix_parameters), 0),
        frozen=base.parameters / scorer,
        trained_bytes=trained_bytes(settings.optimizer, model, scorer) / scorer,
        vocabulary=model.vocabulary or base.vocabulary,
        adapter=None,
        in_4_bits=False,
    )


# --- training


def training_memory(work: Workload, ranks: int, meanwhile: bool = False) -> dict[str, float]:
    """Return the bytes on each GPU that trains at the peak of an update, by role.

    A trained parameter takes `Workload.trained_bytes` and a frozen one `Workload.number`, divided
    by the ranks. Actor and critic are differentiated one after the other, so that one of them has
    its activations at a time. On one GPU it holds its weights rounded to bfloat16 from its forward
    pass to its backward pass, but for embeddings, which only the head reads again; on several, two
    units (`Workload.unit`) are gathered, and a gradient in float32. `meanwhile` says that other
    GPUs generate during the update, so that reward models are in use as well.
    """
    sharded = work.parameters / ranks
    roles = {"trunk": work.trunk / ranks, "actor": work.trained_bytes * work.trained / ranks}
    if work.learners > 1:
        roles["critic"] = roles["actor"]
    on_device = work.read_by_loss + work.reward_models * meanwhile if work.offload else work.frozen
    if on_device:
        roles["reference, reward model"] = work.number * sharded * on_device
    if ranks > 1:
        roles["gathered weights"] = (2 * work.number + FLOAT) * work.unit
    elif work.number != FLOAT:
        again = work.trained
        if work.adapter is None:
            again -= (1 - work.is_tied) * work.embedding
        roles["rounded weights"] = float(work.number * again)
    per_token = activation_bytes(work.model, work.checkpointing, work.number, on_gpu=True)
    roles["activations"] = work.micro_tokens * per_token
    logits = work.micro_tokens * work.vocabulary
    chunk = float(FLOAT * min(logits, max(math.ceil(logits / HEAD_CHUNKS), CHUNK_ELEMENTS)))
    roles["logits"] = (EXACT_KL_COPIES if work.exact_kl else HEAD_COPIES) * chunk
    if ranks == 1 and work.adapter is None:
        held = sum(size for role, size in roles.items() if role in TRANSIENT)
        roles["gradients of embeddings"] = _embedding_gradients(work, chunk, held)
    return roles


def _embedding_gradients(work: Workload, chunk: float, held: float) -> float:
    """Return what the gradients of embeddings and head add to the peak of a micro-batch, beside
    those that are kept. `chunk` are the bytes of a chunk of logits, `held` those of all that the
    backward pass begins with.

    Each is whole before it is added to what is kept. The head's is there together with `held`; that
    of the embeddings comes last, when activations are gone.
    """
    gradient = float(FLOAT * work.embedding)
    at_the_head = held + gradient - (HEAD_COPIES - HEAD_COPIES_BACKWARD[work.number]) * chunk
    copies = TIED_COPIES if work.is_tied else EMBEDDING_COPIES[work.number]
    return max(at_the_head, copies * gradient, held) - held


TRANSIENT = frozenset(
    {"activations", "logits", "gathered weights", "rounded weights", "gradients of embeddings"}
)
"""Roles that are there during an update only."""


def tokens_that_fit(
    work: Workload, ranks: int, room: float, meanwhile: bool = False, share: float = 1.0
) -> int:
    """Return the tokens of the largest micro-batch whose activations and logits fit into a share of
    what an update leaves of `room` bytes beside them; 0 or less if it leaves nothing."""

    def peak(tokens: int) -> float:
        computed = dataclasses.replace(work, micro_tokens=tokens)
        return sum(training_memory(computed, ranks, meanwhile).values())

    fixed, many = peak(1), 2**20
    return int(share * (room - fixed) / ((peak(many) - fixed) / many))


def micro_batch_tokens(
    config: Config, memory: float | None, world: int = 1, words: int | None = None
) -> int:
    """Return the tokens of a micro-batch, for all stages of a run: the setting, or as many as suit
    the machine.

    On a GPU that is as many as fit into half of what the stage that takes most leaves. `memory` is
    the GPU's free memory, None on a CPU; `world` is the number of ranks, which may hold the models
    in parts; `words` as in `stage_workload`.
    """
    base = stage_workload(config, words=words)
    if memory is None or base is None or config.optim.micro_batch_tokens != "auto":
        return micro_batch_on_cpu(config)
    ranks = config.launch.parts(world) if config.launch.shard else 1
    work = dataclasses.replace(base, frozen=_reference(config, base))
    stages = [workload(config, words) if config.rl_stage else work]
    if "reward_model" in config.recipe:
        scorer = reward_model_parameters(config, base.parameters) or base.parameters
        stages.append(reward_model_workload(config, base, scorer))
    tokens = min(tokens_that_fit(stage, ranks, memory, share=SHARE) for stage in stages)
    return min(max(tokens, CPU_MICRO_BATCH), MOST_TOKENS)


def memory_between_updates(memory: dict[str, float], work: Workload) -> float:
    """Return the bytes that training holds on a GPU between two updates. Gradients are gone; with
    `offload`, moments and frozen models are in main memory."""
    kept = FLOAT if work.offload else work.trained_bytes - FLOAT
    return sum(
        size * (kept / work.trained_bytes if role in {"actor", "critic"} else 1.0)
        for role, size in memory.items()
        if role not in TRANSIENT
    )


def load_peak(work: Workload, ranks: int) -> float:
    """Return the bytes on each GPU at the peak of loading, before there are gradients or moments.

    Models are loaded one after another. On several GPUs each reads its own part, and one whole
    tensor at a time. On one, a model arrives in float32 and is then rounded if it is frozen; one in
    4 bits is read and rounded one matrix at a time.
    """
    largest = FLOAT * max(work.vocabulary * work.model.hidden, work.model.matrix_parameters / 8)
    largest = min(largest, FLOAT * work.unit)
    trained = 0.0 if work.adapter is not None else FLOAT * work.parameters * work.learners
    held = (trained + work.trunk + work.number * work.parameters * work.frozen) / ranks
    if ranks > 1 or (work.in_4_bits and not work.frozen):
        return held + largest
    is_rounded = work.number != FLOAT and (work.frozen > 0 or work.adapter is not None)
    return held + (FLOAT - work.number) * work.parameters * is_rounded


# --- generation


def bucket(count: float, smallest: int) -> int:
    """Return the smallest of `smallest`, 2 · `smallest`, 4 · `smallest`, … that is not below
    `count`."""
    return int(smallest * 2 ** max(math.ceil(math.log2(max(count, 1) / smallest)), 0))


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
    """Return every way in which servers can divide `count` GPUs into copies that fits, with 1, 2, 4
    or 8 GPUs each.

    A response holds the pages of the cache that it fills, which are its prompt and response on
    average. `taken` is the memory that training holds on the same GPU. Raises `CannotFit`.
    """
    room, weights = gpu.memory * (1 - RESERVED) - taken, float(work.number * work.parameters)
    per_row = work.row_bytes(work.prompt + work.response)
    longest = work.row_bytes(work.prompt + work.longest)
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
        raise CannotFit(_no_room(weights, longest, count, room))
    return fitting


def native_generation(work: Workload, gpu: Gpu, ranks: int, taken: float = 0.0) -> Copies:
    """Return what each GPU that trains holds while it samples by itself, beside the `taken` memory.

    A decoder holds the weights in the dtype that it computes in, joined and merged with adapters:
    all of them where they are rounded. On several ranks, there is a whole copy of the policy
    too. Its cache has slots for rows, and columns for the longest text that is being written, each
    a power of two, in at most half of the free memory. Raises `CannotFit`.
    """
    room = gpu.memory * (1 - RESERVED) - taken
    weights = decoder_weights(work) + (work.number * work.parameters if ranks > 1 else 0)
    columns = bucket(work.prompt + work.longest + LOOK_AHEAD, CACHE_COLUMNS)
    drawing = SAMPLING_COPIES * FLOAT * work.vocabulary
    per_row, free = work.row_bytes(columns), room - weights
    rows = min(math.ceil(work.rows / ranks), int(free / (2 * per_row + drawing)))
    if rows < 1:
        raise CannotFit(_no_room(weights, per_row, ranks, room))
    slots = min(bucket(float(rows), CACHE_SLOTS), max(int(free / (2 * per_row + drawing)), rows))
    memory = {
        "weights": weights,
        "keys and values": slots * per_row,
        "drawing tokens": rows * drawing,
        # Each graph keeps its logits; the sum over buckets is below two of the largest.
        "CUDA graphs": 2.0 * slots * FLOAT * work.vocabulary,
    }
    return Copies(ranks, 1, rows, memory)


def decoder_weights(work: Workload) -> float:
    """Return the bytes of the weights that a decoder holds beside the model's own."""
    model = work.model
    joined = (1 + 2 * model.heads_share) * model.queries * model.hidden
    joined = model.layers * model.hidden * (joined + 2 * model.intermediate)
    if work.in_4_bits:
        return 0.0
    if work.adapter is not None:
        return work.number * model.matrix_parameters
    return float(work.number * work.parameters) if work.number != FLOAT else FLOAT * joined


def _no_room(weights: float, longest: float, count: int, room: float) -> str:
    return (
        f"generation: {weights / GB:,.0f} GB of weights and {longest / GB:,.2f} GB for one "
        f"answer do not fit into {count} × {room / GB:,.0f} GB."
    )
