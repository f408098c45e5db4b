"""The memory that a run takes in each phase, estimated before torch is loaded."""

import importlib.util
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quartet.config.tables import Config, SharedCritic
from quartet.generation.cache import (
    LOGITS_HELD,
    MIN_ROWS,
    PLAIN_ROWS,
    WIDE_WEIGHT,
    cache_bytes,
)
from quartet.models.architectures import ARCHITECTURES
from quartet.planning.states import States, layer_kinds, states_of
from quartet.rewards.sources import ModelSource
from quartet.stages.kinds import BEST_OF_RESPONSES, CENTRING_PROMPTS
from quartet.training.optimizer_types import ADAMW, TYPES, OptimizerType

FLOAT = 4
PROGRAM_BYTES = 390e6
"""The resident size of Python with torch, transformers and pyarrow loaded, when the first stage
begins. Measured: 138 MB of heap, 95 MB of libraries' pages, 154 MB besides."""
CUDA_BYTES = 325e6
"""What CUDA's libraries add to that where torch is built with them, also without a GPU. Measured
with torch 2.11: 701 MB after the imports, against 378 MB."""
ADAPTER_BYTES = 40e6
"""What peft adds to that where a policy has an adapter. Measured."""
WORKING_BYTES = 60e6
"""Bytes that are in use beside the activations: chunks of logits, intermediate gradients."""
KERNEL_BYTES = 80e6
"""Bytes that the kernels of generation keep; each number of rows has its own. Measured."""
FRAGMENTATION = 1.4
"""The memory that the allocator holds, over the memory in use. Measured."""
TOKENIZER_FACTOR = 10
"""The memory that a tokenizer takes, over the size of its tokenizer.json. Measured."""
NF4_BYTES = 0.516
"""Bytes of a weight in 4 bits, with its block's share of the scales."""
CPU_MICRO_BATCH = 2048
"""Tokens of a micro-batch on CPUs. Larger ones were not faster at any size that was measured, and
with this one rows of similar length share a micro-batch."""
CPU_ACTIVATIONS, LEAST_MICRO_BATCH = 320e6, 256
"""Bytes of activations of a micro-batch on CPUs, and tokens that it has in any case. A model of
270 M parameters has 360 tokens then. That took 4 % longer than 2,048 and 1.6 GB less."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that its activations depend on."""

    hidden: int
    layers: int
    intermediate: int
    heads_share: float = 1.0
    """The width of keys, and of values, over that of queries."""
    queries: float = 1.0
    """The width of queries over `hidden`: more than 1 where a head is wider than hidden / heads."""
    vocabulary: int = 0
    """The numbers of a row of logits; 0 where it is not known."""
    is_fused: bool = True
    """Whether it is of the family with the fused forward pass, which keeps less than that of
    transformers."""
    idle_parameters: int = 0
    """Those of the experts that a token is not sent to; `intermediate` is the width of the others
    together."""
    states: States | None = None
    """What a row holds in a decoder beside keys and values; None where every layer has attention
    and nothing else."""

    @property
    def matrix_parameters(self) -> float:
        """Parameters of the matrices in the blocks of a Llama."""
        attention = (2 + 2 * self.heads_share) * self.queries * self.hidden**2
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


def sizes(config: Config) -> Sizes | None:
    """Return the sizes of the policy: from its shape, or from its folder; None where it is not in a
    folder."""
    shape = config.policy.create
    if shape is not None:
        return Sizes(shape.hidden_size, shape.num_layers, shape.intermediate)
    return folder_sizes(str(config.policy.model))


def folder_sizes(folder: str) -> Sizes | None:
    """Return the sizes of a model in a folder, from its config.json; None where it has none."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return None
    table = json.loads(file.read_text(encoding="utf-8"))
    table = table.get("text_config") or table  # of a model with images, the language model is used
    hidden, layers = table.get("hidden_size") or table.get("n_embd"), len(layer_kinds(table))
    if not hidden or not layers:
        return None
    heads = table.get("num_attention_heads") or table.get("n_head") or 1
    share = (table.get("num_key_value_heads") or heads) / heads
    head_size = table.get("head_dim") or table.get("attention_head_dim") or hidden / heads
    width = head_size * heads
    intermediate = table.get("intermediate_size") or table.get("n_inner") or 4 * hidden
    idle = 0
    if experts := table.get("num_experts") or table.get("num_local_experts"):
        width_of_one = table.get("moe_intermediate_size") or intermediate
        chosen = table.get("num_experts_per_tok") or experts
        idle = layers * 3 * hidden * width_of_one * (experts - chosen)
        shared = table.get("shared_expert_intermediate_size") or 0
        intermediate = chosen * width_of_one + shared
    vocabulary = table.get("vocab_size") or 0
    is_fused = table.get("model_type") in ARCHITECTURES
    states = None if is_fused else states_of(table)
    return Sizes(
        hidden, layers, intermediate, share, width / hidden, vocabulary, is_fused, idle, states
    )


def policy_parameters(config: Config, vocabulary: int | None) -> int | None:
    """Return the number of the policy's parameters: from its shape, or from the headers of its
    folder's files; None where neither is known."""
    if config.policy.create is not None:
        return config.policy.create.parameters(vocabulary) if vocabulary else None
    return _folder_parameters(str(config.policy.model))


def reward_model_parameters(config: Config, policy: int | None) -> int | None:
    """Return the number of parameters of a reward model; `policy` is the policy's, which it has
    unless the run trains it on another backbone. None where it is not known."""
    backbone = config.reward_model.model
    if backbone is None or "reward_model" not in config.recipe:
        return policy
    return _folder_parameters(backbone)


def reference_parameters(config: Config, policy: int | None) -> int | None:
    """Return the number of parameters of the reference; `policy` is the policy's, which it has
    unless reference.model names another model. None where it is not known."""
    folder = config.reference.model
    return policy if folder is None else _folder_parameters(folder)


def reference_share(config: Config, policy: int | None) -> float:
    """Return the size of the reference over the policy's; 1 where it is not known."""
    size = reference_parameters(config, policy)
    return size / policy if size and policy else 1.0


def _folder_parameters(folder: str) -> int | None:
    """Return the number of parameters of a model folder; None if it is not on this machine."""
    return sum(map(_safetensors_parameters, sorted(Path(folder).glob("*.safetensors")))) or None


def _safetensors_parameters(file: Path) -> int:
    """Return the number of parameters in a file. Its header is eight bytes of length, then JSON."""
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        shapes = {n: tensor["shape"] for n, tensor in header.items() if n != "__metadata__"}
        if any("language_model." in name for name in shapes):  # the others are for images
            shapes = {n: s for n, s in shapes.items() if "language_model." in n or "lm_head" in n}
        return sum(map(math.prod, shapes.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0  # loading the model reports what is wrong


def number_bytes(config: Config, on_gpu: bool) -> int:
    """Return the bytes of a number that the policy computes with, of an activation, of the cache,
    and of a frozen weight: 2 in bfloat16. What is trained takes float32 in any case."""
    precision = config.run.precision_of("policy")
    return 2 if precision == "bf16" or (precision == "auto" and on_gpu) else FLOAT


def activation_bytes(
    model: Sizes, checkpointing: bool, number: int = FLOAT, on_gpu: bool = False
) -> float:
    """Return the bytes per token of a micro-batch that the backward pass needs, with so many bytes
    to a number.

    A block of the fused forward pass keeps the residual stream and its norm before attention and
    before the perceptron, queries, keys, values, the output of attention (twice: as it comes out,
    and packed), gate, up and their product. That of transformers was counted on Gemma 3, which has
    norms after attention and perceptron and on queries and keys, too. With checkpointing, each
    block keeps its input, and one block all of it.

    `on_gpu` takes the kernels of CUDA, as they were counted on a device that is only pretended. In
    bfloat16, queries and keys are kept before they are rotated, in float32 while they are, and
    after it. In float32, attention keeps rectangles, for grouped heads with keys and values
    repeated.
    """
    queries = model.queries * model.hidden
    keys = model.heads_share * queries
    if model.is_fused:
        attention = 3 * queries + 2 * keys
        if on_gpu:
            repeated = 2 * queries * (model.heads_share < 1)
            in_float32 = 5 * queries + 3 * keys + repeated
            attention = 6 * queries + 5 * keys if number == 2 else in_float32
        block = 4 * model.hidden + attention + 3 * model.intermediate
    else:
        block = 10 * model.hidden + 4 * queries + 4 * keys + 4 * model.intermediate
    kept = model.layers * model.hidden + block if checkpointing else model.layers * block
    return number * kept


def adapter_parameters(config: Config) -> int | None:
    """Return the number of parameters of one adapter, None where the policy has none. For a model
    whose shape is not known, 1 % of its parameters is the guess."""
    lora, model = config.policy.adapter, sizes(config)
    if lora is None:
        return None
    if model is None:
        return (policy_parameters(config, None) or 0) // 100
    inner = None if model.idle_parameters else model.intermediate  # adapters leave experts out
    return lora.parameters(model.hidden, model.layers, inner, model.heads_share)


def trained_bytes(
    optimizer: OptimizerType, model: Sizes | None, parameters: int, adapter: int | None = None
) -> float:
    """Return the bytes of a trained model: its weights and gradients in float32, and the moments
    that its optimizer keeps of the matrices in its blocks, and of the rest. Of an adapter, which is
    all matrices, only its own parameters count. Where the sizes are not known, the moments are
    those of the rest, which takes most."""
    trained = parameters if adapter is None else adapter
    matrices = 0.0 if model is None else min(model.matrix_parameters, parameters)
    if adapter is not None:
        matrices = adapter
    moments = TYPES[optimizer].bytes_per_parameter * matrices
    return 2 * FLOAT * trained + moments + ADAMW.bytes_per_parameter * (trained - matrices)


def micro_batch_tokens(
    config: Config, parameters: int | None, free_bytes: float | None, world: int = 1
) -> int:
    """Return the tokens of a micro-batch: the setting, or as many as suit the machine.

    On a CPU, that is `cpu_micro_batch`. On a GPU, as many as fit into half of the memory that
    weights, gradients and the optimizer's moments leave. `free_bytes` is the GPU's free memory,
    None on a CPU; `world` is the number of ranks, which may hold the models in parts.
    """
    setting = config.optim.micro_batch_tokens
    if setting != "auto":
        return setting
    model = sizes(config)
    if model is None:
        return CPU_MICRO_BATCH
    learners = 1 + _has_own_critic(config)  # the graphs of both are there at once
    checkpointing = config.policy.gradient_checkpointing
    if free_bytes is None:
        number = number_bytes(config, on_gpu=False)
        return cpu_micro_batch(learners * activation_bytes(model, checkpointing, number))
    needs_critic = bool(config.algorithm and config.algorithm.needs_critic)
    parts = config.launch.parts(world) if config.launch.shard else 1
    offloaded = config.run.offload and config.rl_stage is not None and not config.staleness
    frozen = 0.0 if offloaded else 1 + reference_share(config, parameters)
    number = number_bytes(config, on_gpu=True)
    trained = trained_bytes(config.optim.optimizer, model, parameters or 0) * (1 + needs_critic)
    # The decoder reads the weights in its own dtype; sharded ranks hold a whole copy for it.
    copies = number if number != FLOAT or parts > 1 else 0
    resident = (trained + (parameters or 0) * number * frozen) / parts
    resident += (parameters or 0) * copies
    per_token = learners * activation_bytes(model, checkpointing, number, on_gpu=True)
    return int(min(max((free_bytes - resident) / 2 / per_token, CPU_MICRO_BATCH), 2**16))


def cpu_micro_batch(token_bytes: float) -> int:
    """Return the tokens of a micro-batch on a CPU, where the activations of one take so many
    bytes."""
    return int(min(max(CPU_ACTIVATIONS / token_bytes, LEAST_MICRO_BATCH), CPU_MICRO_BATCH))


def phases(
    config: Config, models: dict[str, int | None], policy: int, row: tuple[float, float]
) -> dict[str, float]:
    """Return the expected resident bytes of each phase, on each rank: the program, weights,
    gradients and moments of what is trained, and the activations of one micro-batch; where
    responses are sampled, what the decoder holds.

    `models` are the parameters by role, `policy` the policy's, `row` the tokens of a prompt and of
    a response on average. Responses that are sampled count with the most tokens that they may
    have: a policy that has learnt little ends few of them.
    """
    launch = config.launch
    parts = launch.parts(launch.processes) if launch.shard else 1
    model = sizes(config) or Sizes(int(60 * (policy / 12) ** 0.5) // 10, 1, 0)
    number = number_bytes(config, on_gpu=False)
    per_token = activation_bytes(model, config.policy.gradient_checkpointing, number)
    tokens = micro_batch_tokens(config, policy, None)
    whole = _whole_bytes(config, model, policy, number)
    weights = whole / parts
    adapter = adapter_parameters(config)
    scorer = reward_model_parameters(config, policy) or policy
    trained = _trained(config, policy, scorer, parts)
    trunk = 0.0 if adapter is None else weights
    reference = number * (models["reference"] or policy) / parts if "reference" in models else 0.0
    program = _program_bytes() + ADAPTER_BYTES * (adapter is not None) + _tokenizer_bytes(config)
    longest = row[0] + config.rollout.max_new_tokens

    def micro(batch: float, learners: int = 1) -> float:
        return WORKING_BYTES + FRAGMENTATION * learners * min(batch, tokens) * per_token

    def sampling(rows: int) -> float:
        return _sampling_bytes(config, model, policy, rows, longest)

    memory = {}
    if "sft" in config.recipe:
        memory["sft"] = program + trunk + trained["sft"] + micro(config.sft.batch_size * sum(row))
    if "reward_model" in config.recipe:
        # It is trained first, and then centred on responses of the policy.
        used = max(micro(2 * config.reward_model.batch_size * sum(row)), sampling(CENTRING_PROMPTS))
        memory["reward model"] = program + weights + trained["reward_model"] + used
    if config.preference_stage:
        frozen = trunk + reference
        memory[config.preference_stage] = (
            program
            + frozen
            + trained["preference"]
            + micro(config.preference.batch_size * (row[0] + 2 * row[1]))  # one prompt, two sides
        )
    if "ilql" in config.recipe:
        # Beside the policy: the head of Q with its gradient and moments, and the target's.
        heads = (4 + 1) * FLOAT * model.vocabulary * model.hidden
        used = heads + micro(config.ilql.batch_size * sum(row))
        memory["ilql"] = program + trained["ilql"] + used
    if (custom := config.stage_source) is not None:
        sampled = sampling(custom.batch_size) if custom.reads == "prompts" else 0.0
        used = sampled + micro(custom.batch_size * sum(row))
        memory["custom"] = program + trunk + reference + trained["custom"] + used
    if config.rl_stage:
        rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        learners = 1 + _has_own_critic(config)
        memory[f"{config.rl_stage} update"] = (
            program
            + weights * _frozen_models(config, models, scorer / policy)
            + reference
            + learners * trained["optim"]
            + sampling(rows)
            + micro(_minibatch_tokens(config, row[0]), learners)
        )
    if "evaluation" in config.recipe:
        answers = BEST_OF_RESPONSES if config.evaluation.best_of >= 2 else config.evaluation.prompts
        memory["evaluation"] = (
            program + whole + number * scorer * _scorers(config, models) + sampling(answers)
        )
    return memory


def _minibatch_tokens(config: Config, prompt: float) -> float:
    """Return the most tokens that a minibatch of the RL stage computes. A prompt is computed once
    for the responses to it; several minibatches divide the responses at random, so each may have
    one of every prompt."""
    rollout = config.rollout
    responses = -(
        -rollout.prompts_per_step * rollout.samples_per_prompt // config.optim.minibatches
    )
    prompts = min(rollout.prompts_per_step, responses)
    return prompts * prompt + responses * rollout.max_new_tokens


def _trained(config: Config, policy: int, scorer: int, parts: int) -> dict[str, float]:
    """Return the bytes of what each stage trains, by its table; adapters share one trunk."""
    adapter = adapter_parameters(config)
    trained = {
        table: trained_bytes(settings.optimizer, sizes(config), policy, adapter) / parts
        for table, settings in config.optimizers()
    }
    if config.reward_model.model is not None and "reward_model" in trained:
        optimizer = config.reward_model.optimizer
        trained["reward_model"] = trained_bytes(optimizer, None, scorer) / parts
    for table, settings in config.stage_trainings():
        if settings.keep == "best":  # a copy of what is trained
            is_scorer = table == "reward_model" and config.reward_model.model is not None
            size = policy if adapter is None else adapter
            trained[table] += FLOAT * (scorer if is_scorer else size) / parts
    return trained


def _whole_bytes(config: Config, model: Sizes, policy: int, number: int) -> float:
    """Return the bytes of the policy's weights, frozen and whole."""
    matrices = min(model.matrix_parameters, policy) if config.policy.quantize is not None else 0.0
    return number * (policy - matrices) + NF4_BYTES * matrices


def _program_bytes() -> float:
    """Return the size of the program with the build of torch that is installed. The wheels of
    CUDA's libraries are in the namespace `nvidia`; torch itself is not imported for a plan."""
    has_cuda = importlib.util.find_spec("nvidia") is not None
    return PROGRAM_BYTES + CUDA_BYTES * has_cuda


def _tokenizer_bytes(config: Config) -> float:
    """Return the bytes of the policy's tokenizer, for which the size of its file stands."""
    file = Path(str(config.policy.model)) / "tokenizer.json"
    return float(TOKENIZER_FACTOR * file.stat().st_size) if file.is_file() else 0.0


def _sampling_bytes(
    config: Config, model: Sizes, policy: int, num_rows: int, tokens: float
) -> float:
    """Return the bytes that a decoder holds while it samples rows of so many tokens: the weights in
    its own layout, keys and values, and the logits of the rows."""
    number = number_bytes(config, on_gpu=False)
    matrices = min(model.matrix_parameters, policy)
    embeddings = policy - matrices
    logits = LOGITS_HELD * FLOAT * (model.vocabulary or embeddings / max(model.hidden, 1))
    row_bytes = row_cache_bytes(model, tokens, number) + logits
    most = max(cache_bytes() // row_bytes, MIN_ROWS) if model.is_fused else PLAIN_ROWS
    rows = min(num_rows, most)
    copied = 0.0
    if model.is_fused and config.policy.quantize is None:
        head = min(model.vocabulary * model.hidden, embeddings) or embeddings
        copied = matrices + (head if head < WIDE_WEIGHT else 0.0)
    return KERNEL_BYTES + number * copied + rows * row_bytes


def _scorers(config: Config, models: Mapping[str, int | None]) -> int:
    """Return how many reward models an evaluation loads, each whole."""
    return max(len(config.reward_models), 1) * has_reward_model(models)


def _has_own_critic(config: Config) -> bool:
    needs_critic = bool(config.algorithm and config.algorithm.needs_critic)
    return needs_critic and not isinstance(config.critic, SharedCritic)


def _frozen_models(config: Config, models: Mapping[str, int | None], size: float) -> float:
    """Return how many frozen models of the policy's size an RL stage holds beside the reference:
    under an adapter, the trunk, and reward models that are no adapters on it. `size` is that of a
    reward model that the run trains, over the policy's."""
    trained = size * max(len(config.reward_models), 1)
    if config.policy.adapter is None:
        return trained * has_reward_model(models)
    on_own_backbone = trained * (config.reward_model.model is not None) * has_reward_model(models)
    elsewhere = sum(isinstance(r, ModelSource) and r.model is not None for r in config.reward)
    return 1 + elsewhere + (0 if elsewhere else on_own_backbone)


def has_reward_model(models: Mapping[str, int | None]) -> bool:
    """Return whether a reward model is among the models of a run, by role."""
    return any(role.startswith("reward model") for role in models)


def row_cache_bytes(model: Sizes, tokens: int | float, number: int) -> float:
    """Return the bytes of the cache of a decoder for a row of so many tokens, with so many bytes to
    a number: keys, values and recurrent states. It has room for the longest response of the rows
    that are left; the allocator keeps its memory for the next step."""
    states = model.states or States(model.layers)
    keys = model.heads_share * model.queries * model.hidden * tokens
    numbers = 2 * states.attention_layers * keys + states.convolution
    return number * numbers + FLOAT * states.state
