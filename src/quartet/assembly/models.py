"""The models of a run: created or loaded, with adapters, compiled blocks and sharding."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quartet.assembly.named import resolved_model
from quartet.config.rules.base import has_trust_region
from quartet.config.run import PrecisionName, Role, RolePrecision
from quartet.config.tables import Config
from quartet.distributed.process_group import ProcessGroup, TorchProcessGroup
from quartet.models.actor_critic import freeze, pad_token_id
from quartet.models.adapters import (
    POLICY,
    REFERENCE,
    REWARD,
    AdapterView,
    adapter_parameters,
    adapters_of,
    add_adapter,
    freeze_adapter,
    freeze_layers,
    frozen_copy,
    read_adapter,
)
from quartet.models.architectures import longest_fused, why_not_fused
from quartet.models.attention import why_padded
from quartet.models.heads import AdaptedScalar, ScalarModel, attach
from quartet.models.language_model import (
    add_embeddings,
    create,
    language_config,
    load_model,
    longest_of,
    shape_config,
)
from quartet.models.loading import Rows, fill, trunk_weights, weights_for
from quartet.models.precision import DTYPES, compute_dtype, compute_in, dtype_of
from quartet.models.protocols import Tokenizer
from quartet.models.quantize import quantize
from quartet.models.recurrent import is_recurrent
from quartet.models.shape import Shape
from quartet.models.skeleton import skeleton
from quartet.models.support import limit_support
from quartet.models.text_classifier import (
    TextReader,
    load_scorer,
    new_scorer,
    reads_tokens_of,
)
from quartet.models.trunk import checkpoint_blocks, compile_blocks
from quartet.stages.rounds import ONLY_ROUND, Round


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a stage's policy starts from."""

    model: Path | str | None
    """Their folder, or their name on the hub; None if the policy is created."""
    adapter: Path | None = None
    """The folder of the adapter that each new adapter starts as, on that model: the policy's of the
    round before, or what SFT has learnt on a base in 4 bits. Merged into the base and rounded
    again, most of the latter would be lost."""

    def __str__(self) -> str:
        return str(self.model or "policy.create")


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
        self.reward_backbone = resolved_model("reward_model.model", config.reward_model.model)
        """The folder, or the name on the hub, of the model that reward models are trained from;
        None if that is the policy."""
        self.reference_model = resolved_model("reference.model", config.reference.model)
        """The folder, or the name on the hub, of the reference; None if that is the model that a
        stage starts from."""
        self.round, self.first_round = ONLY_ROUND, self
        self.meshes: dict[Any, Any] = {}
        """The mesh over which the models of each of torch's process groups are sharded."""

    def in_round(self, number: Round, config: Config) -> "Models":
        """Return the models of a round, whose settings have its seed. Those of a later round start
        from the round before; the reference stays that of the first."""
        own = copy.copy(self)
        own.round, own.config = number, config
        return own

    def longest_sequence(self) -> int:
        """Return the most tokens that the policy can read; 10⁹ for an architecture without a
        limit."""
        policy = self.config.policy
        if policy.create is not None:
            return policy.create.max_length
        return longest_of(language_config(str(self.folder)))

    @property
    def trained_backbone(self) -> str | None:
        """The backbone of the reward models that this run trains, where it is not the policy's."""
        return self.reward_backbone if "reward_model" in self.config.recipe else None

    @cached_property
    def text_reader(self) -> TextReader | None:
        """How the reward models that this run trains read texts; None where they read the policy's
        token ids."""
        folder = self.trained_backbone
        if folder is None or reads_tokens_of(folder, self.tokenizer):
            return None
        return TextReader.of(folder)

    def start(self, folder: Path | None) -> "Start":
        """Return what the policy of a stage starts from. `folder` is the run's, and None before its
        SFT stage."""
        if folder is not None and (before := self.round.before(folder)) is not None:
            if self.config.policy.adapter is None:
                return Start(before / "policy")
            return Start(self.first_round.start(folder).model, before / "policy" / "adapter")
        if folder is None or "sft" not in self.config.recipe:
            return Start(self.folder)
        if self.config.policy.quantize is not None:
            return Start(self.folder, folder / "sft" / "adapter")
        return Start(folder / "sft")

    def initial_policy(self, folder: Path | None) -> Any:
        """Return the policy that a stage starts from, whole; in float32, or frozen on a base in 4
        bits. In a later round with an adapter it is the base under that of the round before."""
        return self._initial(self.start(folder))

    def _initial(self, start: "Start") -> Any:
        def adapted(model: Any) -> Any:
            return model if start.adapter is None else self._add_adapter(model, POLICY, start)

        if self.config.policy.quantize is not None:

            def prepare(model: Any) -> Any:
                return self.frozen_policy(adapted(model))

            return self._read(start, prepare, in_parts=False)
        return adapted(self.prepare_blocks(self._whole(start).to(self.device)))

    def _whole(self, start: "Start") -> Any:
        """Return the policy that a stage starts from, in main memory."""
        policy = self.config.policy
        if start.model is None:
            assert policy.create is not None
            return create(policy.create, self.tokenizer, self.first_round.config.seed)
        model = load_model(start.model)
        if policy.resize_embeddings:
            add_embeddings(model, self.tokenizer)
        return limit_support(model, self.tokenizer)

    def trained_policy(self, source: Path | str) -> Any:
        """Return a policy that training has written, frozen, to be sampled from."""
        adapter = Path(source) / "adapter"
        if self.config.policy.quantize is not None and adapter.is_dir():
            return self._initial(Start(self.folder, adapter))
        policy = limit_support(load_model(source, self.device), self.tokenizer)
        return self.frozen_policy(policy)

    def trainable_policy(self, folder: Path | None, *adapters: str) -> Any:
        """Return the policy that a stage starts from, ready to be trained: in its precision, with
        an adapter or with its first layers frozen, as the config asks, and in parts where the
        config shards it. `adapters` are further ones, which a trunk in parts must get before its
        weights are read."""
        start = self.start(folder)

        def prepare(model: Any) -> Any:
            model = self._trainable(model, start)
            for name in adapters:
                self._add_adapter(model, name, start)
            return model

        if self.is_in_parts():
            return self._read(start, prepare)
        return self._trainable(self.initial_policy(folder), start)

    def _trainable(self, model: Any, start: "Start") -> Any:
        if self.config.policy.adapter is not None:
            return self._add_adapter(model, POLICY, start)
        freeze_layers(model, self.config.policy.frozen_layers)
        return compute_in(model, self.dtype("policy"))

    def _add_adapter(self, model: Any, name: str, start: "Start", seed: int | None = None) -> Any:
        """Return the model with an adapter of this name, which is trained; one that it has stays as
        it is. `seed` is that of its initial weights, the run's own if it is None."""
        lora = self.config.policy.adapter
        assert lora is not None
        if name not in adapters_of(model):
            add_adapter(model, lora, name, self.config.seed if seed is None else seed)
            if start.adapter is not None:
                read_adapter(model, name, start.adapter)
        for p in adapter_parameters(model, name):
            p.requires_grad_(True)
        return compute_in(model, self.dtype("policy"))

    def frozen_policy(self, model: Any) -> Any:
        """Return a policy that is only sampled from, held in the policy's precision."""
        return compute_in(freeze(model), self.dtype("policy"))

    def reference_of(self, actor: Any, folder: Path | None) -> Any:
        """Return the reference of a policy, held in its own precision: reference.model, or what the
        stage starts from, in the first round of several. Under an adapter the latter is the
        policy's trunk, where that starts from an adapter under another one."""
        start, dtype = self.first_round.start(folder), self.dtype("reference")
        if self.reference_model is not None:
            return self._reference_of_its_own(Start(self.reference_model))
        if self.round.number > 1 and not adapters_of(actor):
            return self._reference_of_its_own(start)
        if start.adapter is not None:
            freeze_adapter(self._add_adapter(actor, REFERENCE, start), REFERENCE)
            return AdapterView(compute_in(actor, self.dtype("policy")), REFERENCE)
        if adapters_of(actor):
            return AdapterView(actor, None)
        if self.is_in_parts():  # a part cannot be copied
            return self._read(start, lambda model: compute_in(freeze(model), dtype))
        return frozen_copy(actor, dtype)

    def _reference_of_its_own(self, start: "Start") -> Any:
        """Return a reference that shares no weights with the policy; it is never in 4 bits."""
        dtype = self.dtype("reference")
        if not self.is_in_parts():
            whole = self.prepare_blocks(self._whole(start).to(self.device))
            return compute_in(freeze(whole), dtype)
        model, weights = self._skeleton(start)
        model = self._shard(compute_in(freeze(self.prepare_blocks(model)), dtype))
        return fill(model, weights, self.device, start)

    def sampled_policy(self, actor: Any, folder: Path | None) -> Any:
        """Return the model that responses are sampled with: a copy of the actor if the actor is in
        parts, because each sampled token needs all weights, or if it is trained meanwhile. The
        copy is held in the dtype that the actor computes in."""
        if self.is_in_parts():
            start = self.start(folder)
            return self._read(
                start,
                lambda model: self.frozen_policy(self._trainable(model, start)),
                in_parts=False,
            )
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
        may_use_tf32 = torch.get_float32_matmul_precision() != "highest"
        if self.device.type == "cuda" and may_use_tf32 and torch.cuda.is_tf32_supported():
            return "fp32 (products in TF32)"
        return "fp32"

    def policy_config(self) -> Any:
        """Return the transformers config of the policy that the run starts from."""
        create = self.config.policy.create
        if create is None:
            return language_config(str(self.folder))
        return shape_config(create, self.tokenizer)

    def why_slow(self) -> str | None:
        """Return why the policy has no fused forward pass of ours, as the end of a sentence."""
        why: str | None = why_not_fused(self.policy_config())
        return why

    def slow_path(self) -> str | None:
        """Return a sentence where the policy goes through transformers' forward pass, always or for
        long texts, or through slower attention than newer releases of torch have."""
        why, longest = self.why_slow(), longest_fused(self.policy_config())
        if why is not None:
            kernels = " run.log names packages with faster kernels, if one is missing."
            return (
                f"{why[0].upper()}{why[1:]}: the policy goes through transformers' own forward "
                "pass and cache, in training and in sampling, which is slower."
                + kernels
                * is_recurrent(self.policy_config())
            )
        if longest is not None and longest < self.longest_sequence():
            return (
                f"Texts of more than {longest:,} tokens go through transformers' own forward pass "
                "and cache, which is slower: LongRoPE rotates them by other frequencies."
            )
        return why_padded(self.device, self.dtype("policy"))

    def dtype(self, role: Role) -> torch.dtype:
        """Return what a model computes in."""
        precision = self.config.run.precision_of(role)
        if precision == "auto" and has_trust_region(self.config):
            precision = "fp32"
        return dtype_of(precision, self.device)

    def prepare_blocks(self, model: Any) -> Any:
        """Return the model with its blocks checkpointed or compiled, as the config asks."""
        policy = self.config.policy
        if policy.gradient_checkpointing:
            checkpoint_blocks(model)
        can_compile = policy.compile and why_not_fused(model.config) is None
        return compile_blocks(model) if can_compile else model

    def new_scalar(
        self, policy: Any, adapter: str, folder: Path | None, seed: int | None = None
    ) -> ScalarModel:
        """Return a scalar model with a new head. Its trunk is a copy of the policy that the stage
        starts from; if the policy is an adapter, its trunk is the same base model with a second
        adapter. `seed` is that of its new weights, the run's own if it is None."""
        pad, start = pad_token_id(self.tokenizer), self.start(folder)
        seed = self.config.seed if seed is None else seed
        if self.config.policy.adapter is not None:
            adapted = self._add_adapter(policy, adapter, start, seed)
            return AdaptedScalar(adapted, adapter, pad, seed)
        dtype = self.dtype("reward_model" if adapter == REWARD else "critic")
        if self.is_in_parts():
            model, weights = self._skeleton(start)
            trunk = trunk_weights(model, weights)
            return self._scalar_in_parts(model.config, dtype, trunk, start, seed)
        share_frozen = self.config.policy.frozen_layers > 0
        scalar = ScalarModel.from_trunk(policy, pad, seed, share_frozen=share_frozen)
        self.prepare_blocks(scalar.model)
        return scalar.compute_in(dtype)

    def created_critic(self, shape: Shape) -> ScalarModel:
        """Return a critic of this shape with random weights."""
        pad, dtype = pad_token_id(self.tokenizer), self.dtype("critic")
        whole = create(shape, self.tokenizer, self.config.seed)
        if not self.is_in_parts():
            scalar = ScalarModel.from_trunk(whole.to(self.device), pad, self.config.seed)
            self.prepare_blocks(scalar.model)
            return scalar.compute_in(dtype)
        weights = trunk_weights(whole, whole.state_dict())
        return self._scalar_in_parts(
            whole.config, dtype, weights, "critic.create", self.config.seed
        )

    def _scalar_in_parts(
        self, config: Any, dtype: torch.dtype, trunk: Mapping[str, Rows], source: Any, seed: int
    ) -> ScalarModel:
        """Return a scalar model with a new head over a trunk of these weights, in parts."""
        scalar = ScalarModel.over(config, pad_token_id(self.tokenizer))
        self.prepare_blocks(scalar.model)
        self._shard(scalar.compute_in(dtype).model)
        return scalar.fill_trunk(trunk, self.device, source, seed)

    def new_reward_model(self, folder: Path, name: str, seed: int) -> tuple[ScalarModel, Any]:
        """Return the reward model of this name to be trained, and the policy that samples the
        responses on which it is centred. An adapter shares the policy's base model unless that is
        in parts. `seed` is that of the new weights; in a later round there are none, the reward
        model of the round before is trained on."""
        if (before := self.round.before(folder)) is not None:
            return self._continued_reward_model(folder, before / name)
        start, has_adapter = self.start(folder), self.config.policy.adapter is not None
        if self.reward_backbone is not None:
            return self._new_scorer(seed), self.frozen_policy(self.initial_policy(folder))
        if not self.is_in_parts():
            policy = self.initial_policy(folder)
            scalar = self.new_scalar(policy, REWARD, folder, seed)
            return scalar, policy if has_adapter else self.frozen_policy(policy)
        trunk = None
        if has_adapter:
            trunk = self._read(start, lambda model: self._add_adapter(model, REWARD, start, seed))
        scalar = self.new_scalar(trunk, REWARD, folder, seed)
        return scalar, self._read(start, self.frozen_policy, in_parts=False)

    def _continued_reward_model(self, folder: Path, source: Path) -> tuple[ScalarModel, Any]:
        """Return the reward model that the round before wrote to `source`, to be trained on, and
        the policy."""
        policy = self.frozen_policy(self.initial_policy(folder))
        if (source / "adapter").is_dir():
            pad = pad_token_id(self.tokenizer)
            adapted = attach(policy, REWARD, source / "adapter", pad).requires_grad_(True)
            compute_in(policy, self.dtype("policy"))
            return adapted, policy
        scalar = load_scorer(source, self.device)
        self.prepare_blocks(scalar.model)
        return scalar.compute_in(self.dtype("reward_model")), policy

    def _new_scorer(self, seed: int) -> ScalarModel:
        """Return a reward model to be trained on a backbone of its own: all of its weights, also
        where the policy has an adapter or frozen layers."""
        assert self.reward_backbone is not None
        reader = self.text_reader
        tokenizer = self.tokenizer if reader is None else reader.tokenizer
        scalar = new_scorer(self.reward_backbone, tokenizer, self.device, seed)
        self.prepare_blocks(scalar.model)
        return scalar.compute_in(self.dtype("reward_model"))

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

    # --- models that are built before their weights are read ---

    def is_in_parts(self, process_group: ProcessGroup | None = None) -> bool:
        """Return whether the ranks of a process group, the run's own if it is None, hold models in
        parts."""
        group = process_group or self.process_group
        return bool(self.config.launch.shard) and isinstance(group, TorchProcessGroup)

    def _read(self, start: "Start", prepare: Callable[[Any], Any], in_parts: bool = True) -> Any:
        """Return the policy that a stage starts from. It is quantized, prepared and sharded before
        its weights are read, as the config asks; with `in_parts=False` every rank reads it
        whole."""
        model, weights = self._skeleton(start)
        if self.config.policy.quantize is not None:
            quantize(model)
        model = prepare(self.prepare_blocks(model))
        if in_parts:
            self._shard(model)
        return fill(model, weights, self.device, start)

    def _skeleton(self, start: "Start") -> tuple[Any, Mapping[str, Rows]]:
        """Return the policy that a stage starts from without weights, and its weights by name."""
        if start.model is None or self.config.policy.resize_embeddings:
            whole = self._whole(start)
            model, weights = skeleton(whole.config), whole.state_dict()
        else:
            model = skeleton(language_config(start.model))
            weights = weights_for(model, start.model)
        return limit_support(model, self.tokenizer), weights

    def _shard(self, model: Any, process_group: ProcessGroup | None = None) -> Any:
        """Shard a model over the ranks of a process group, which gathers its weights."""
        from quartet.training.parallelize import mesh_of, parallelize

        group = process_group or self.process_group
        assert isinstance(group, TorchProcessGroup)
        joined = group.group or torch.distributed.group.WORLD  # another one after each `join`
        if joined not in self.meshes:
            parts = self.config.launch.parts(group.world_size)
            self.meshes[joined] = mesh_of(self.device.type, group, parts)
        return parallelize(model, self.meshes[joined])
