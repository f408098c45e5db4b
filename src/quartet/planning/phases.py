"""The memory that a run takes in each phase, on each rank, estimated before torch is loaded."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from quartet.config.tables import Config
from quartet.generation.cache import (
    LOGITS_HELD,
    MIN_ROWS,
    PLAIN_ROWS,
    PREFILL_TOKENS,
    WIDE_WEIGHT,
    cache_bytes,
)
from quartet.io.heap import LARGE, MAX_THRESHOLD
from quartet.planning.memory import (
    FLOAT,
    NF4_BYTES,
    Sizes,
    activation_bytes,
    adapter_parameters,
    block_bytes,
    has_own_critic,
    micro_batch_on_cpu,
    number_bytes,
    reward_model_parameters,
    row_cache_bytes,
    sizes,
    trained_bytes,
)
from quartet.rewards.sources import ModelSource
from quartet.stages.kinds import BEST_OF_RESPONSES, CENTRING_PROMPTS

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
"""Bytes that the kernels of generation keep; each number of rows has its own. Those of an RL stage
stay when the evaluation has others. Measured."""
FRAGMENTATION = 1.4
"""The memory that the allocator holds for activations and for a decoder's weights and cache, over
the memory that they use. Measured."""
TOKENIZER_FACTOR = 10
"""The memory that a tokenizer takes, over the size of its tokenizer.json. Measured."""


def phases(
    config: Config, models: dict[str, int | None], policy: int, row: tuple[float, float]
) -> dict[str, float]:
    """Return the expected resident bytes of each phase, on each rank: the program, weights,
    gradients and moments of what is trained, and what is there while it computes (`_Working`).

    `models` are the parameters by role, `policy` the policy's, `row` the tokens of a prompt and of
    a response on average.
    """
    launch = config.launch
    parts = launch.parts(launch.processes) if launch.shard else 1
    model = sizes(config) or Sizes(int(60 * (policy / 12) ** 0.5) // 10, 1, 0)
    number = number_bytes(config, on_gpu=False)
    whole = _whole_bytes(config, model, policy, number)
    weights = whole / parts
    adapter = adapter_parameters(config)
    scorer = reward_model_parameters(config, policy) or policy
    trained = _trained(config, policy, scorer, parts)
    trunk = 0.0 if adapter is None else weights
    reference = number * (models["reference"] or policy) / parts if "reference" in models else 0.0
    program = _program_bytes() + ADAPTER_BYTES * (adapter is not None) + _tokenizer_bytes(config)
    working = _Working(config, model, policy, row)
    scorers = number * scorer * _scorers(config, models)

    memory = {}
    if "sft" in config.recipe:
        used = working.training(config.sft.batch_size * sum(row))
        memory["sft"] = program + trunk + trained["sft"] + used
    if "reward_model" in config.recipe:
        # It is trained first, and then centred on responses of the policy.
        used = working.training(2 * config.reward_model.batch_size * sum(row))
        used = max(used, working.sampling(CENTRING_PROMPTS))
        memory["reward model"] = program + weights + trained["reward_model"] + used
    if config.preference_stage:
        # One prompt, two sides.
        used = working.training(config.preference.batch_size * (row[0] + 2 * row[1]))
        frozen = trunk + reference
        if config.has_online_pairs:
            frozen += scorers
            used = working.step(2 * config.preference.batch_size, used)
        memory[config.preference_stage] = program + frozen + trained["preference"] + used
    if "ilql" in config.recipe:
        # Beside the policy: the head of Q with its gradient and moments, and the target's.
        heads = (4 + 1) * FLOAT * model.vocabulary * model.hidden
        used = heads + working.training(config.ilql.batch_size * sum(row))
        memory["ilql"] = program + trained["ilql"] + used
    if (custom := config.stage_source) is not None:
        # How many responses it samples to a prompt is its own business: one is counted.
        used = working.training(custom.batch_size * sum(row))
        if custom.reads == "prompts":
            used = scorers + working.step(custom.batch_size, used)
        memory["custom"] = program + trunk + reference + trained["custom"] + used
    if config.rl_stage:
        memory[f"{config.rl_stage} update"] = (
            program
            + weights * _frozen_models(config, models, scorer / policy)
            + reference
            + (1 + has_own_critic(config)) * trained["optim"]
            + working.rl_step()
        )
    if "evaluation" in config.recipe:
        answers = BEST_OF_RESPONSES if config.evaluation.best_of >= 2 else config.evaluation.prompts
        left = KERNEL_BYTES * _samples(config)
        memory["evaluation"] = program + left + whole + scorers + working.sampling(answers)
    return memory


@dataclass(frozen=True)
class _Working:
    """What a stage holds while it computes, beside its models."""

    config: Config
    model: Sizes
    policy: int
    """Parameters of the policy."""
    row: tuple[float, float]
    """Tokens of a prompt and of a response on average."""

    @cached_property
    def number(self) -> int:
        """Bytes of a number that the policy computes with."""
        return number_bytes(self.config, on_gpu=False)

    @cached_property
    def embeddings(self) -> float:
        """Parameters of the embeddings, which the head shares or has as many of."""
        outside = self.policy - self.matrices
        return float(min(self.model.vocabulary * self.model.hidden, outside) or outside)

    @cached_property
    def matrices(self) -> float:
        """Parameters of the matrices in the policy's blocks."""
        return float(min(self.model.matrix_parameters, self.policy))

    @cached_property
    def narrow(self) -> float:
        """Bytes of the policy's weights without the head of a large vocabulary."""
        head = self.embeddings if self.embeddings < WIDE_WEIGHT else 0.0
        return self.number * (self.matrices + head)

    def training(self, tokens: float) -> float:
        """Return the bytes of a micro-batch out of so many tokens, and of gradients on their way.

        Embeddings that are trained count twice more: the gradients that the head and the embeddings
        add to the one that is kept, and then two temporaries of AdamW's step. Those are whole
        tensors, which holes between activations are too small for. A stage that trains an adapter
        ends with copies of the matrices that the adapter is merged into, and of the embeddings
        where they are held in another dtype: a model is saved in float32, one in 4 bits in
        bfloat16.
        """
        per_token = activation_bytes(
            self.model, self.config.policy.gradient_checkpointing, self.number
        )
        limit = micro_batch_on_cpu(self.config)
        used = WORKING_BYTES + FRAGMENTATION * min(tokens, limit) * per_token
        if self.config.policy.adapter is None:
            return used + 2 * FLOAT * self.embeddings
        saved = FLOAT if self.config.policy.quantize is None else FLOAT // 2
        converted = self.embeddings if self.number != saved else 0
        return max(used, FRAGMENTATION * saved * (self._merged() + converted))

    def sampling(self, rows: int, fragmentation: float = FRAGMENTATION) -> float:
        """Return the bytes that a decoder holds while it samples so many rows: the weights in its
        own layout, keys and values, and the logits of the rows.

        Responses count with the most tokens that they may have: a policy that has learnt little
        ends few of them. So do prompts from files, since a cache has room for its longest row. A
        pass over many prompts has what a block computes beside the cache. Tensors that are large
        enough to come from the system leave no holes.
        """
        config, model = self.config, self.model
        prompt = self.row[0] if config.data.world is not None else config.data.max_prompt_tokens
        cache = row_cache_bytes(model, prompt + config.rollout.max_new_tokens, self.number)
        vocabulary = model.vocabulary or self.embeddings / max(model.hidden, 1)
        logits = LOGITS_HELD * FLOAT * vocabulary
        most = max(cache_bytes() // (cache + logits), MIN_ROWS) if model.is_fused else PLAIN_ROWS
        rows = int(min(rows, most))
        has_copies = model.is_fused and config.policy.quantize is None
        prefill = min(rows * self.row[0], PREFILL_TOKENS) * block_bytes(model, self.number)
        pieces, whole = self.narrow * has_copies, rows * cache
        if whole / model.layers < MAX_THRESHOLD:  # keys and values of a layer are one tensor
            pieces, whole = pieces + whole, 0.0
        return KERNEL_BYTES + fragmentation * pieces + whole + prefill + rows * logits

    def rl_step(self) -> float:
        """Return the bytes of an RL step."""
        rollout = self.config.rollout
        rows = rollout.prompts_per_step * rollout.samples_per_prompt
        return self.step(rows, self.training(minibatch_tokens(self.config, self.row[0])))

    def step(self, rows: int, update: float) -> float:
        """Return the bytes of a step that samples so many rows and trains on them, whose update
        takes so many. The decoder's memory is returned in between where it is large
        (`io/heap.py`), and else filled by the update."""
        if self.narrow >= LARGE:
            return max(self.sampling(rows), KERNEL_BYTES + update)
        return self.sampling(rows, fragmentation=1.0) + update

    def _merged(self) -> float:
        """Return the parameters of the matrices that an adapter changes; it leaves experts out."""
        if self.model.idle_parameters:
            return replace(self.model, intermediate=0).matrix_parameters
        return self.matrices


def minibatch_tokens(config: Config, prompt: float) -> float:
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


def _samples(config: Config) -> bool:
    """Return whether a stage before the evaluation samples responses to learn from."""
    custom = config.stage_source
    return config.rewarded_stage is not None or (custom is not None and custom.reads == "prompts")


def _scorers(config: Config, models: Mapping[str, int | None]) -> int:
    """Return how many reward models a stage loads, each whole."""
    return max(len(config.reward_models), 1) * has_reward_model(models)


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
