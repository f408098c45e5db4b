"""The memory that a run takes, phase by phase, worked out before anything heavy is loaded."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from quartet.config.tables import Config, SharedCritic
from quartet.rewards.sources import ModelSource

FLOAT = 4
PROGRAM_BYTES = 500e6
"""The resident size of Python with torch, transformers and pyarrow loaded, measured."""
WORKING_BYTES = 60e6
"""What is alive beside the activations: chunks of logits, gradients on their way."""
KERNEL_BYTES = 80e6
"""What the kernels of generation keep, made for every number of rows. Measured."""
UNJOINED = 1.4
"""What the allocator holds over what is alive: freed pieces that it cannot join. Measured."""
CPU_MICRO_BATCH = 2048
"""On CPUs larger micro-batches were not faster at any size that was measured, and rows of like
length end up together."""


@dataclass(frozen=True)
class Sizes:
    """What activations depend on."""

    hidden: int
    layers: int
    intermediate: int
    heads_share: float = 1.0
    """The width of keys, and of values, over that of queries."""


def sizes(config: Config) -> Sizes | None:
    """Of the model that is created, or of the folder's config.json; None where there is no folder
    to look into."""
    shape = config.policy.create
    if shape is not None:
        return Sizes(shape.hidden_size, shape.num_layers, shape.intermediate)
    file = Path(str(config.policy.model)) / "config.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    hidden, layers = (
        found.get("hidden_size") or found.get("n_embd"),
        found.get("num_hidden_layers") or found.get("n_layer"),
    )
    if not hidden or not layers:
        return None
    heads = found.get("num_attention_heads") or 1
    share = (found.get("num_key_value_heads") or heads) / heads
    return Sizes(
        hidden, layers, found.get("intermediate_size") or found.get("n_inner") or 4 * hidden, share
    )


def policy_parameters(config: Config, vocabulary: int | None) -> int | None:
    """How many numbers the policy holds: counted from its shape, or from the headers of its
    folder's files."""
    if config.policy.create is not None:
        return config.policy.create.parameters(vocabulary) if vocabulary else None
    files = sorted(Path(str(config.policy.model)).glob("*.safetensors"))
    return sum(_safetensors_parameters(file) for file in files) or None


def _safetensors_parameters(file: Path) -> int:
    """Counted from the header: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        return sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0  # loading it will say what is wrong


def activation_bytes(model: Sizes, checkpointing: bool) -> float:
    """Per token of a micro-batch, what the backward pass needs of the Llama family written out: of
    each block the residual stream and its norm before attention and before the perceptron, queries,
    keys, values, what attention read (twice: as it comes out and packed), gate, up and their
    product. With checkpoints: each block's input, and all that of one block."""
    block = (7 + 2 * model.heads_share) * model.hidden + 3 * model.intermediate
    kept = model.layers * model.hidden + block if checkpointing else model.layers * block
    return FLOAT * kept


def adapter_parameters(config: Config) -> int | None:
    """How many numbers one adapter holds; None where there is none. Of a model whose shape is not
    known, a guess of 1 %."""
    lora, model = config.policy.adapter, sizes(config)
    if lora is None:
        return None
    if model is None:
        return (policy_parameters(config, None) or 0) // 100
    return lora.parameters(model.hidden, model.layers, model.intermediate, model.heads_share)


def micro_batch_tokens(
    config: Config, parameters: int | None, free_bytes: float | None, world: int = 1
) -> int:
    """The setting, or what suits: on a GPU as many tokens as fit into half of what its free memory
    has left beside weights, gradients and the optimizer's moments. `world`: ranks, over which those
    may be in parts."""
    setting = config.optim.micro_batch_tokens
    if setting != "auto":
        return setting
    model = sizes(config)
    if free_bytes is None or model is None:
        return CPU_MICRO_BATCH
    needs_critic = bool(config.algorithm and config.algorithm.needs_critic)
    parts = config.launch.parts(world) if config.launch.shard else 1
    rests = config.run.offload and config.rl_stage is not None and not config.staleness
    read = 0 if rests else 2
    resident = (
        FLOAT * (parameters or 0) * ((4 * (1 + needs_critic) + read) / parts + (parts > 1))
    )  # and a copy to sample with
    per_token = activation_bytes(model, config.policy.gradient_checkpointing)
    return int(min(max((free_bytes - resident) / 2 / per_token, CPU_MICRO_BATCH), 2**16))


def phases(
    config: Config, models: dict[str, int | None], policy: int, row: float
) -> dict[str, float]:
    """Expected resident bytes: program + weights + gradients and two Adam moments of what is
    trained + activations of one micro-batch, whose rows have `row` tokens on average. Of each rank,
    where several hold the models in parts."""
    launch = config.launch
    parts = launch.parts(launch.processes) if launch.shard else 1
    model = sizes(config) or Sizes(int(60 * (policy / 12) ** 0.5) // 10, 1, 0)
    per_token = activation_bytes(model, config.policy.gradient_checkpointing)
    tokens = micro_batch_tokens(config, policy, None)
    whole = FLOAT * policy
    weights = whole / parts
    adapter = adapter_parameters(config)
    # Of what is trained: weights, gradients and two moments. Adapters are that on one trunk,
    # whoever else reads it.
    trained = 4 * FLOAT * (policy if adapter is None else adapter) / parts
    trunk = 0.0 if adapter is None else weights

    def micro(rows: int, learners: int = 1) -> float:
        return WORKING_BYTES + UNJOINED * learners * min(rows * row, tokens) * per_token

    memory = {}
    if "sft" in config.recipe:
        memory["sft"] = PROGRAM_BYTES + trunk + trained + micro(config.sft.batch_size)
    if "reward_model" in config.recipe:
        memory["reward model"] = (
            PROGRAM_BYTES + weights + trained + micro(2 * config.reward_model.batch_size)
        )
    if config.preference_stage:
        frozen = weights * (config.preference.loss.needs_reference or adapter is not None)
        memory[config.preference_stage] = (
            PROGRAM_BYTES + frozen + trained + micro(2 * config.preference.batch_size)
        )
    if config.rl_stage:
        frozen = weights * sum(role in models for role in ("reward model", "reference"))
        if adapter is not None:  # one trunk, and whole reward models that were trained elsewhere
            frozen = weights * (
                1 + sum(isinstance(r, ModelSource) and r.model is not None for r in config.reward)
            )
        has_critic = bool(config.algorithm and config.algorithm.needs_critic) and not isinstance(
            config.critic, SharedCritic
        )
        learners = 1 + has_critic
        rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        # A cache is as wide as the longest answer, for the rows that are left; its memory waits for
        # the next step.
        cache = (
            FLOAT
            * 2
            * model.layers
            * model.heads_share
            * model.hidden
            * rows
            * (row + config.rollout.max_new_tokens / 2)
        )
        resident = PROGRAM_BYTES + KERNEL_BYTES + frozen + learners * trained + whole + cache
        memory[f"{config.rl_stage} update"] = resident + micro(
            -(-rows // config.optim.minibatches), learners
        )
    return memory
