"""The models of a run, made or loaded, and as they are to run."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from quartet.config.tables import Config
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.distributed.sharding import is_sharded
from quartet.models.actor_critic import pad_token_id
from quartet.models.adapters import POLICY, REWARD, add_adapter, freeze_layers
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import ModelError, create, load_model, read_config
from quartet.models.llama import FAMILY
from quartet.models.protocols import Tokenizer
from quartet.models.trunk import checkpoint_blocks, compile_blocks
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import EnsembleSource, ModelSource, StepsSource


class Models:
    """Makes them anew each time it is asked."""

    def __init__(
        self,
        config: Config,
        folder: str | None,
        tokenizer: Tokenizer,
        device: torch.device,
        process_group: ProcessGroup,
    ) -> None:
        """`folder`: of the policy that the run begins with, or its name on the hub; None where it
        is created."""
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
        """How many tokens the policy reads at most; architectures without such a limit read any
        number."""
        policy = self.config.policy
        if policy.create is not None:
            return policy.create.max_length
        return (
            getattr(
                read_config(str(self.folder)).get_text_config(), "max_position_embeddings", None
            )
            or 10**9
        )

    def check(self) -> None:
        """What can be known of the models before they are loaded."""
        policy = self.config.policy
        kind = (
            policy.create.type
            if policy.create
            else read_config(str(self.folder)).get_text_config().model_type
        )
        if policy.compile and kind not in FAMILY:
            raise ModelError(
                f"policy.compile = true: is there for {', '.join(sorted(FAMILY))}, not for {kind}. "
                f"Use false."
            )
        if self.folder is not None:
            size = read_config(self.folder).get_text_config().vocab_size
            if len(self.tokenizer) > size:
                raise ModelError(
                    f"policy.tokenizer has {len(self.tokenizer):,} tokens, but "
                    f"{self.config.policy.model} knows only {size:,}. "
                    "Use the model's own tokenizer."
                )

    def base(self) -> Any:
        """The model that the run begins with."""
        policy = self.config.policy
        if policy.create is not None:
            return self.set_up(
                create(policy.create, self.tokenizer, self.config.seed).to(self.device)
            )
        return self.set_up(load_model(str(self.folder), self.device))

    def before(self, folder: Path) -> Any:
        """The policy that RL starts from, and is held to: the run's own SFT model where it made
        one."""
        if "sft" not in self.config.recipe:
            return self.base()
        return self.set_up(load_model(folder / "sft", self.device))

    def starting(self, folder: Path) -> Any:
        """The same, as it will learn."""
        return self.learning(self.before(folder))

    def learning(self, model: Any) -> Any:
        """Under an adapter, or with its first layers frozen, where the config says so."""
        policy = self.config.policy
        if policy.adapter is not None:
            return add_adapter(model, policy.adapter, POLICY, self.config.seed)
        return freeze_layers(model, policy.frozen_layers)

    def set_up(self, model: Any) -> Any:
        """Its blocks as they are to run."""
        policy = self.config.policy
        if policy.gradient_checkpointing:
            checkpoint_blocks(model)
        return compile_blocks(model) if policy.compile else model

    def new_scalar(self, policy: Any, adapter: str) -> ScalarModel:
        """A new head, on a copy of the policy's trunk or, where the policy is an adapter, on
        another adapter beside it."""
        pad, seed, lora = pad_token_id(self.tokenizer), self.config.seed, self.config.policy.adapter
        if lora is not None:
            return AdaptedScalar(add_adapter(policy, lora, adapter, seed), adapter, pad, seed)
        made = ScalarModel.from_trunk(
            policy, pad, seed, share_frozen=self.config.policy.frozen_layers > 0
        )
        self.set_up(made.model)
        return made

    def new_reward_model(self, policy: Any) -> ScalarModel:
        """A reward model to be trained. The policy will write answers for it, so a trunk that goes
        into parts is a copy."""
        trunk = (
            copy.deepcopy(policy)
            if self.config.launch.shard and self.config.policy.adapter is not None
            else policy
        )
        return self.spread_scalar(self.new_scalar(trunk, REWARD))

    def spread(self, model: Any, process_group: ProcessGroup | None = None) -> Any:
        """Return the model, sharded over the ranks where the config says so. `process_group` is the
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
        if isinstance(scalar, AdaptedScalar):
            self.spread(scalar.view.model, process_group)
            scalar.collect_parameters()
        else:
            self.spread(scalar.model, process_group)
        return scalar


def device(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """What the config's name means for this rank: of several GPUs each rank has one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{process_group.rank % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'run.device = "{name}": cannot be used here ({str(error).splitlines()[0]}).'
        ) from error


def with_existing_models(source: RewardSource) -> RewardSource:
    """The source, its folders absolute."""
    match source:
        case ModelSource(model=model):
            return dataclasses.replace(source, model=existing("reward.model", model))
        case StepsSource(model=model):
            return dataclasses.replace(source, model=str(existing("reward.model", model)))
        case EnsembleSource(models=models):
            return dataclasses.replace(
                source, models=tuple(str(existing("reward.models", model)) for model in models)
            )
    return source


def existing(key: str, model: str | None) -> str | None:
    """A model's folder as an absolute path, so that it stays the same folder when `runs/latest`
    moves on; a hub id, which is `name` or `owner/name`, as it is."""
    if model is None or Path(model).is_dir():
        return None if model is None else str(Path(model).resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f'{key} = "{model}": no such folder.')
    return model
