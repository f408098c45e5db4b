"""The models of a run: created or loaded, with adapters, compiled blocks and sharding."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from quartet.algorithms.update import TrustRegion
from quartet.config.run import PrecisionName, Role, RolePrecision
from quartet.config.tables import Config, SeparateCritic
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.distributed.sharding import is_sharded
from quartet.models.actor_critic import freeze, pad_token_id
from quartet.models.adapters import (
    CRITIC,
    POLICY,
    REWARD,
    AdapterView,
    add_adapter,
    freeze_layers,
    reference_of,
)
from quartet.models.architectures import longest_fused, why_not_fused
from quartet.models.heads import AdaptedScalar, ScalarModel, define_classifier
from quartet.models.language_model import (
    ModelError,
    create,
    is_recurrent,
    load_model,
    read_config,
    shape_config,
)
from quartet.models.precision import DTYPES, best_precision, compute_in
from quartet.models.protocols import Tokenizer
from quartet.models.trunk import checkpoint_blocks, compile_blocks
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import EnsembleSource, ModelSource, StepsSource


class Models:
    """Creates or loads the models of a run. Each call returns a new model."""

    def __init__(
        self,
        config: Config,
        folder: str | None,
        tokenizer: Tokenizer,
        device: torch.device,
        process_group: ProcessGroup,
    ) -> None:
        """`folder` is the folder, or the name on the hub, of the policy that the run starts from;
        None if the policy is created."""
        self.config, self.folder, self.tokenizer, self.device, self.process_group = (
            config,
            folder,
            tokenizer,
            device,
            process_group,
        )
        self.meshes: dict[ProcessGroup, Any] = {}
        """The mesh over which the models of each process group are sharded."""

    def longest_sequence(self) -> int:
        """Return the most tokens that the policy can read; 10⁹ for an architecture without a
        limit."""
        policy = self.config.policy
        if policy.create is not None:
            return policy.create.max_length
        text_config = read_config(str(self.folder)).get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or 10**9

    def check(self) -> None:
        """Check what is known of the models before they are loaded. Raises `ModelError`."""
        policy = self.config.policy
        if policy.compile and (why := self.why_slow()) is not None:
            raise ModelError(
                f"policy.compile = true: compiles Quartet's own forward pass, and {why}. Use false."
            )
        self._check_sampling()
        if self._needs_classifier():
            define_classifier(self.policy_config())
        if self.folder is not None:
            size = read_config(self.folder).get_text_config().vocab_size
            if len(self.tokenizer) > size:
                raise ModelError(
                    f"policy.tokenizer has {len(self.tokenizer):,} tokens, but "
                    f"{self.config.policy.model} knows only {size:,}. "
                    "Use the model's own tokenizer."
                )

    def _check_sampling(self) -> None:
        """Raise `ModelError` if answers would be sampled from a recurrent model."""
        config = self.policy_config()
        if self.config.reads("rollout") and is_recurrent(config):
            raise ModelError(
                f"policy.model: {config.model_type} keeps a recurrent state, and Quartet cannot "
                "sample from such a model yet. Use a model whose layers all attend to tokens, or a "
                "recipe that samples nothing, such as sft or dpo."
            )

    def _needs_classifier(self) -> bool:
        """Return whether the run makes a reward model or a critic of the policy's trunk."""
        config = self.config
        has_critic = config.algorithm is not None and config.algorithm.needs_critic
        own_critic = has_critic and isinstance(config.critic, SeparateCritic)
        return "reward_model" in config.recipe or (config.rl_stage is not None and own_critic)

    def base_model(self) -> Any:
        """Return the model that the run starts from."""
        policy = self.config.policy
        if policy.create is not None:
            model = create(policy.create, self.tokenizer, self.config.seed)
            return self.prepare_blocks(model.to(self.device))
        return self.prepare_blocks(load_model(str(self.folder), self.device))

    def initial_policy(self, folder: Path) -> Any:
        """Return the policy before RL or preference training: the SFT model in the run folder if
        the recipe has that stage, else the base model."""
        if "sft" not in self.config.recipe:
            return self.base_model()
        return self.prepare_blocks(load_model(folder / "sft", self.device))

    def trainable_policy(self, folder: Path) -> Any:
        """Return the initial policy, ready to be trained."""
        return self.trainable(self.initial_policy(folder))

    def trainable(self, model: Any) -> Any:
        """Return the model in its precision, with an adapter or with its first layers frozen, as
        the config asks."""
        policy = self.config.policy
        if policy.adapter is not None:
            add_adapter(model, policy.adapter, POLICY, self.config.seed)
        else:
            freeze_layers(model, policy.frozen_layers)
        return compute_in(model, self.dtype("policy"))

    def frozen_policy(self, model: Any) -> Any:
        """Return a policy that is only sampled from, held in the policy's precision."""
        return compute_in(freeze(model), self.dtype("policy"))

    def reference_of(self, actor: Any) -> Any:
        """Return the reference of a policy, held in its own precision; under an adapter it is the
        policy's trunk."""
        reference = reference_of(actor)
        if isinstance(reference, AdapterView):
            return reference
        return compute_in(reference, self.dtype("reference"))

    def chosen_precision(self) -> RolePrecision | PrecisionName:
        """Return run.precision with what "auto" means here, as one word where all models have the
        same. A checkpoint holds it: a run that goes on elsewhere must compute alike."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        policy = names[self.dtype("policy")]
        others = names[self.dtype("critic")], names[self.dtype("reference")]
        chosen = RolePrecision(policy, *others, names[self.dtype("reward_model")])
        same = chosen == RolePrecision(policy, policy, policy, policy)
        return policy if same else chosen

    def precision(self) -> str:
        """Return what the policy computes in, in a word or two."""
        if self.dtype("policy") == torch.bfloat16:
            return "bf16"
        uses_tf32 = torch.get_float32_matmul_precision() != "highest"
        return "fp32 (products in TF32)" if self.device.type == "cuda" and uses_tf32 else "fp32"

    def policy_config(self) -> Any:
        """Return the transformers config of the policy that the run starts from."""
        create = self.config.policy.create
        if create is None:
            return read_config(str(self.folder))
        return shape_config(create, self.tokenizer)

    def why_slow(self) -> str | None:
        """Return why the policy has no fused forward pass of ours, as the end of a sentence."""
        why: str | None = why_not_fused(self.policy_config())
        return why

    def slow_path(self) -> str | None:
        """Return a sentence where the policy goes through transformers' forward pass, always or for
        long texts."""
        why, longest = self.why_slow(), longest_fused(self.policy_config())
        if why is not None:
            return (
                f"{why[0].upper()}{why[1:]}: the policy goes through transformers' own forward "
                "pass and cache, in training and in sampling, which is slower."
            )
        if longest is not None and longest < self.longest_sequence():
            return (
                f"Texts of more than {longest:,} tokens go through transformers' own forward pass "
                "and cache, which is slower: LongRoPE rotates them by other frequencies."
            )
        return None

    def dtype(self, role: Role) -> torch.dtype:
        """Return what a model computes in."""
        precision = self.config.run.precision_of(role)
        if precision == "auto":
            needs_fp32 = self.config.algorithm is not None and isinstance(
                self.config.algorithm.update, TrustRegion
            )
            precision = "fp32" if needs_fp32 else best_precision(self.device)
        return DTYPES[precision]

    def prepare_blocks(self, model: Any) -> Any:
        """Return the model with its blocks checkpointed or compiled, as the config asks."""
        policy = self.config.policy
        if policy.gradient_checkpointing:
            checkpoint_blocks(model)
        return compile_blocks(model) if policy.compile else model

    def new_scalar(self, policy: Any, adapter: str) -> ScalarModel:
        """Return a scalar model with a new head. Its trunk is a copy of the policy's; if the policy
        is an adapter, its trunk is the same base model with a second adapter."""
        pad, seed, lora = pad_token_id(self.tokenizer), self.config.seed, self.config.policy.adapter
        if lora is not None:
            trunk = compute_in(add_adapter(policy, lora, adapter, seed), self.dtype("policy"))
            return AdaptedScalar(trunk, adapter, pad, seed)
        share_frozen = self.config.policy.frozen_layers > 0
        scalar = ScalarModel.from_trunk(policy, pad, seed, share_frozen=share_frozen)
        self.prepare_blocks(scalar.model)
        return scalar.compute_in(self.dtype("critic" if adapter == CRITIC else "reward_model"))

    def new_reward_model(self, policy: Any) -> ScalarModel:
        """Return a reward model to be trained.

        The policy samples responses on which the reward model is centred. Where the two share a
        base model that is sharded, the reward model therefore gets a copy.
        """
        is_shared = self.config.policy.adapter is not None
        trunk = copy.deepcopy(policy) if self.config.launch.shard and is_shared else policy
        scalar = self.new_scalar(trunk, REWARD)
        if trunk is not policy or not is_shared:
            self.frozen_policy(policy)  # only sampled from here
        return self.spread_scalar(scalar)

    def spread(self, model: Any, process_group: ProcessGroup | None = None) -> Any:
        """Return the model, sharded over the ranks if the config says so. `process_group` is the
        one that gathers its weights; None is the run's own."""
        process_group = process_group or self.process_group
        if (
            not self.config.launch.shard
            or not isinstance(process_group, TorchProcessGroup)
            or any(map(is_sharded, model.parameters()))
        ):
            return model
        from quartet.training.parallelize import mesh_of, parallelize

        if process_group not in self.meshes:
            self.meshes[process_group] = mesh_of(
                self.device.type, process_group, self.config.launch.parts(process_group.world_size)
            )
        return parallelize(model, self.meshes[process_group])

    def spread_scalar(
        self, scalar: ScalarModel, process_group: ProcessGroup | None = None
    ) -> ScalarModel:
        """Return the scalar model, sharded as by `spread`."""
        if isinstance(scalar, AdaptedScalar):
            self.spread(scalar.view.model, process_group)
            scalar.collect_parameters()
        else:
            self.spread(scalar.model, process_group)
        return scalar


def device(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """Return the device of this rank for the name in the config. Of several GPUs each rank gets
    one. Raises `ModelError` if it cannot be used."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{process_group.rank % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'run.device = "{name}": cannot be used here ({str(error).splitlines()[0]}).'
        ) from error


def with_resolved_models(source: RewardSource) -> RewardSource:
    """Return the reward source with the absolute paths of its models."""
    match source:
        case ModelSource(model=model):
            return dataclasses.replace(source, model=resolved_model("reward.model", model))
        case StepsSource(model=model):
            return dataclasses.replace(source, model=str(resolved_model("reward.model", model)))
        case EnsembleSource(models=models):
            resolved = (str(resolved_model("reward.models", model)) for model in models)
            return dataclasses.replace(source, models=tuple(resolved))
    return source


def resolved_model(key: str, model: str | None) -> str | None:
    """Return a model's folder as an absolute path, so that it stays the same when `runs/latest`
    changes. A hub id, `name` or `owner/name`, is returned as it is. `key` is named in errors."""
    if model is None:
        return None
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f'{key} = "{model}": no such folder.')
    return model
