"""The sizes of a run's models, and the bytes of what a run holds of them, estimated before torch is
loaded."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from quartet.config.tables import Config, SharedCritic
from quartet.models.architectures import ARCHITECTURES
from quartet.planning.states import States, layer_kinds, states_of
from quartet.training.optimizer_types import ADAMW, TYPES, OptimizerType

FLOAT = 4
NF4_BYTES = 0.516
"""Bytes of a weight in 4 bits, with its block's share of the scales."""
CPU_MICRO_BATCH = 2048
"""Tokens of a micro-batch on CPUs. Larger ones were not faster at any size that was measured, and
with this one rows of similar length share a micro-batch."""
CPU_ACTIVATIONS, LEAST_MICRO_BATCH = 320e6, 256
"""Bytes of activations of a micro-batch on CPUs, and tokens that it has in any case. A model of
270 M parameters has 360 tokens then. That took 4% longer than 2,048 and 1.6 GB less."""


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
    block = block_bytes(model, number, on_gpu)
    if checkpointing:
        return number * model.layers * model.hidden + block
    return model.layers * block


def block_bytes(model: Sizes, number: int = FLOAT, on_gpu: bool = False) -> float:
    """Return the bytes per token of what one block computes, as `activation_bytes` counts them."""
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
    return number * block


def adapter_parameters(config: Config) -> int | None:
    """Return the number of parameters of one adapter, None where the policy has none. For a model
    whose shape is not known, 1% of its parameters is the guess."""
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


def micro_batch_on_cpu(config: Config) -> int:
    """Return the tokens of a micro-batch on a CPU: the setting, or as many as suit one."""
    setting, model = config.optim.micro_batch_tokens, sizes(config)
    if setting != "auto":
        return setting
    if model is None:
        return CPU_MICRO_BATCH
    number = number_bytes(config, on_gpu=False)
    return cpu_micro_batch(activation_bytes(model, config.policy.gradient_checkpointing, number))


def scoring_tokens(config: Config, micro_batch: int) -> int:
    """Return the tokens of a forward pass without a gradient, of which only one block's activations
    are in memory, given those of a micro-batch: the setting, or as many as suit a CPU. A
    micro-batch on a GPU has as many in any case."""
    model = sizes(config)
    if config.optim.micro_batch_tokens != "auto" or model is None:
        return micro_batch
    of_block = block_bytes(model, number_bytes(config, on_gpu=False))
    return max(micro_batch, cpu_micro_batch(of_block))


def cpu_micro_batch(token_bytes: float) -> int:
    """Return the tokens of a micro-batch on a CPU, where the activations of one take so many
    bytes."""
    return int(min(max(CPU_ACTIVATIONS / token_bytes, LEAST_MICRO_BATCH), CPU_MICRO_BATCH))


def has_own_critic(config: Config) -> bool:
    """Return whether a run trains a critic with weights of its own."""
    needs_critic = bool(config.algorithm and config.algorithm.needs_critic)
    return needs_critic and not isinstance(config.critic, SharedCritic)


def row_cache_bytes(model: Sizes, tokens: int | float, number: int) -> float:
    """Return the bytes of the cache of a decoder for a row of so many tokens, with so many bytes to
    a number: keys, values and recurrent states. It has room for the longest response of the rows
    that are left; the allocator keeps its memory for the next step."""
    states = model.states or States(model.layers)
    keys = model.heads_share * model.queries * model.hidden * tokens
    numbers = 2 * states.attention_layers * keys + states.convolution
    return number * numbers + FLOAT * states.state
