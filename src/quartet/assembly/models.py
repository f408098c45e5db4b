"""The models of a run: created or loaded, with adapters, compiled blocks and sharding."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quartet.algorithms.update import TrustRegion
from quartet.config.run import PrecisionName, Role, RolePrecision
from quartet.config.tables import Config
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.models.actor_critic import freeze, pad_token_id
from quartet.models.adapters import (
    POLICY,
    REWARD,
    AdapterView,
    adapters_of,
    add_adapter,
    freeze_layers,
    frozen_copy,
)
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import ModelError, create, load_model, read_config
from quartet.models.llama import FAMILY
from quartet.models.loading import Rows, fill, skeleton, trunk_weights, weights_for
from quartet.models.precision import DTYPES, best_precision, compute_dtype, compute_in
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
        kind = (
            policy.create.type
            if policy.create
            else read_config(str(self.folder)).get_text_config().model_type
        )
        if policy.compile and kind not in FAMILY:
            raise ModelError(
                f"policy.compile = true: works with {', '.join(sorted(FAMILY))}, not with {kind}. "
                "Use false."
            )
        if self.folder is not None:
            size = read_config(self.folder).get_text_config().vocab_size
            if len(self.tokenizer) > size:
                raise ModelError(
                    f"policy.tokenizer has {len(self.tokenizer):,} tokens, but "
                    f"{self.config.policy.model} knows only {size:,}. "
                    "Use the model's own tokenizer."
                )

    def origin(self, folder: Path | None) -> Path | str | None:
        """Return where the policy of a run is read from before RL or preference training: its SFT
        model if the recipe has that stage (`folder` is the run's; None: before that stage), else
        the folder that the run starts from. None if the policy is created."""
        if folder is not None and "sft" in self.config.recipe:
            return folder / "sft"
        return self.folder

    def initial_policy(self, folder: Path | None) -> Any:
        """Return the policy that a stage starts from, whole, in float32; see `origin`."""
        origin = self.origin(folder)
        if origin is not None:
            return self.prepare_blocks(load_model(origin, self.device))
        return self.prepare_blocks(self._created().to(self.device))

    def _created(self) -> Any:
        shape = self.config.policy.create
        assert shape is not None
        return create(shape, self.tokenizer, self.config.seed)

    def trainable_policy(self, folder: Path | None, *adapters: str) -> Any:
        """Return the policy that a stage starts from, ready to be trained: in its precision, with
        an adapter or with its first layers frozen, as the config asks, and in parts where the
        config shards it. `adapters` are further ones that a trunk in parts gets at once."""

        def prepare(model: Any) -> Any:
            model = self.trainable(model)
            for name in adapters:
                self._add_adapter(model, name)
            return model

        if not self.is_in_parts():
            return self.trainable(self.initial_policy(folder))
        return self._policy_in_parts(folder, prepare)

    def trainable(self, model: Any) -> Any:
        """Return the model in its precision, with an adapter or with its first layers frozen, as
        the config asks."""
        if self.config.policy.adapter is not None:
            return self._add_adapter(model, POLICY)
        freeze_layers(model, self.config.policy.frozen_layers)
        return compute_in(model, self.dtype("policy"))

    def _add_adapter(self, model: Any, name: str) -> Any:
        """Return the model with one more adapter, which is trained; one that it has stays."""
        lora = self.config.policy.adapter
        assert lora is not None
        if name not in adapters_of(model):
            add_adapter(model, lora, name, self.config.seed)
        return compute_in(model, self.dtype("policy"))

    def frozen_policy(self, model: Any) -> Any:
        """Return a policy that is only sampled from, held in the policy's precision."""
        return compute_in(freeze(model), self.dtype("policy"))

    def reference_of(self, actor: Any, folder: Path | None) -> Any:
        """Return the reference of a policy, held in its own precision; under an adapter it is the
        policy's trunk. It is the policy that the stage starts from, so that weights in parts are
        read again instead of copied."""
        if adapters_of(actor):
            return AdapterView(actor, None)
        dtype = self.dtype("reference")
        if self.is_in_parts():
            return self._policy_in_parts(folder, lambda model: compute_in(freeze(model), dtype))
        return frozen_copy(actor, dtype)

    def sampled_policy(self, actor: Any, folder: Path | None) -> Any:
        """Return the model that responses are sampled with: a copy of the actor if the actor is in
        parts, because each sampled token needs all weights, or if it is trained meanwhile. The
        copy is held in the dtype that the actor computes in."""
        if self.is_in_parts():
            whole = freeze(self.trainable(self.initial_policy(folder)))
            return compute_in(whole, self.dtype("policy"))
        return frozen_copy(actor, compute_dtype(actor)) if self.config.staleness else actor

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

    def slow_path(self) -> str | None:
        """Return a sentence where the policy's architecture has no fused forward pass of ours."""
        policy = self.config.policy
        kind: str = (
            policy.create.type
            if policy.create
            else read_config(str(self.folder)).get_text_config().model_type
        )
        if kind in FAMILY:
            return None
        return (
            f"{kind} goes through transformers' own forward pass and cache, in training and in "
            f"sampling. Quartet's own, which is faster, is for {', '.join(sorted(FAMILY))}."
        )

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

    def new_scalar(self, policy: Any, adapter: str, folder: Path | None) -> ScalarModel:
        """Return a scalar model with a new head. Its trunk is a copy of the policy that the stage
        starts from; if the policy is an adapter, its trunk is the same base model with a second
        adapter."""
        pad, seed = pad_token_id(self.tokenizer), self.config.seed
        if self.config.policy.adapter is not None:
            return AdaptedScalar(self._add_adapter(policy, adapter), adapter, pad, seed)
        dtype = self.dtype("reward_model" if adapter == REWARD else "critic")
        if self.is_in_parts():
            model, weights = self._skeleton_and_weights(folder)
            scalar = ScalarModel.over(model.config, pad)
            self.prepare_blocks(scalar.model)
            self._shard(scalar.compute_in(dtype).model)
            trunk = trunk_weights(model, weights)
            return scalar.fill_trunk(trunk, self.device, self.origin(folder), seed)
        share_frozen = self.config.policy.frozen_layers > 0
        scalar = ScalarModel.from_trunk(policy, pad, seed, share_frozen=share_frozen)
        self.prepare_blocks(scalar.model)
        return scalar.compute_in(dtype)

    def new_reward_model(self, folder: Path) -> tuple[ScalarModel, Any]:
        """Return a reward model to be trained, and the policy that samples the responses on which
        it is centred. The two share a base model unless it is in parts."""
        if not self.is_in_parts():
            policy = self.initial_policy(folder)
            scalar = self.new_scalar(policy, REWARD, folder)
            if self.config.policy.adapter is None:
                self.frozen_policy(policy)
            return scalar, policy
        trunk = None
        if self.config.policy.adapter is not None:
            trunk = self._policy_in_parts(folder, lambda model: self._add_adapter(model, REWARD))
        scalar = self.new_scalar(trunk, REWARD, folder)
        return scalar, self.frozen_policy(self.initial_policy(folder))

    def load_scalar(
        self, source: str | Path, role: Role, process_group: ProcessGroup | None = None
    ) -> ScalarModel:
        """Return the reward model, frozen, or the critic of a folder or hub id, in its precision.
        Its weights are in parts over the process group, the run's own if it is None, where the
        config shards models."""
        in_parts = self.is_in_parts(process_group)
        scalar = (
            ScalarModel.of_folder(source) if in_parts else ScalarModel.load(source, self.device)
        )
        if role == "reward_model":
            freeze(scalar)
        self.prepare_blocks(scalar.model)
        scalar.compute_in(self.dtype(role))
        if in_parts:
            self._shard(scalar.model, process_group)
            scalar.fill(source, self.device)
        return scalar

    # --- models in parts ---

    def is_in_parts(self, process_group: ProcessGroup | None = None) -> bool:
        """Return whether the ranks of a process group, the run's own if it is None, hold models in
        parts."""
        group = process_group or self.process_group
        return bool(self.config.launch.shard) and isinstance(group, TorchProcessGroup)

    def _skeleton_and_weights(self, folder: Path | None) -> tuple[Any, Mapping[str, Rows]]:
        """Return the policy that a stage starts from without weights, and its weights by name."""
        origin = self.origin(folder)
        if origin is None:
            whole = self._created()
            return skeleton(whole.config), whole.state_dict()
        model = skeleton(read_config(origin))
        return model, weights_for(model, origin)

    def _policy_in_parts(self, folder: Path | None, prepare: Callable[[Any], Any]) -> Any:
        """Return the policy that a stage starts from in parts: it is prepared and sharded before
        its weights are read."""
        model, weights = self._skeleton_and_weights(folder)
        model = self._shard(prepare(self.prepare_blocks(model)))
        return fill(model, weights, self.device, self.origin(folder))

    def _shard(self, model: Any, process_group: ProcessGroup | None = None) -> Any:
        """Shard a model over the ranks of a process group, which gathers its weights."""
        from quartet.training.parallelize import mesh_of, parallelize

        group = process_group or self.process_group
        assert isinstance(group, TorchProcessGroup)
        if group not in self.meshes:
            parts = self.config.launch.parts(group.world_size)
            self.meshes[group] = mesh_of(self.device.type, group, parts)
        return parallelize(model, self.meshes[group])


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
