"""The objects that all stages of a run share: device, tokenizer, data, models and rewards."""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from quartet.assembly.data import Rows
from quartet.assembly.device import device, unused_gpu
from quartet.assembly.generators import Generators
from quartet.assembly.model_checks import check_models
from quartet.assembly.models import Models
from quartet.assembly.named import resolved_model, with_resolved_models
from quartet.assembly.rewards import RewardMaker
from quartet.config.rules.base import has_trust_region
from quartet.config.tables import Config, SeparateCritic, TrainTokenizer
from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from quartet.data.records import Comparison
from quartet.data.tokenizer import train_tokenizer
from quartet.distributed.offload import NO_OFFLOAD, Offloading, Placement
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.experience import Prompt
from quartet.generation.episodes import check_second_turn
from quartet.generation.source import Servers
from quartet.io.install import install_command
from quartet.loops.source import StageSource
from quartet.models.adapters import AdapterError
from quartet.models.chat import set_chat_template, set_template_variables
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import ModelError, load_tokenizer
from quartet.models.quantize import bitsandbytes
from quartet.planning.gpu_memory import micro_batch_tokens
from quartet.planning.memory import policy_parameters, scoring_tokens
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import check_trackers
from quartet.rewards.combine import EnsembleReward
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Reward, Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.shared import shared
from quartet.rewards.source import RewardContext
from quartet.rewards.sources import JudgeSource, ModelSource, is_trained_here
from quartet.rewards.text_models import StepReward, TextModelReward
from quartet.stages.kinds import LABEL
from quartet.stages.rounds import ONLY_ROUND, Round
from quartet.training.optim import OptimizerConfig
from quartet.training.optimizer_types import TYPES, OptimizerError
from quartet.worlds import World, gold_accuracy, make_world

ROUND_SEEDS = 100_000
"""The distance between the seeds of a recipe's rounds, more than that of an ensemble's members."""


HIGH_RATE, PRETRAINED = 10, 50e6
"""How many times the default is too high a rate for all weights of a pretrained model, and the
parameters from which on a model in a folder is taken for one."""


@dataclass(frozen=True)
class Comparisons:
    """What reward models are trained and tested on, in their own tokens."""

    train: Sequence[Comparison]
    held_out: Sequence[Comparison]
    shown: Sequence[Comparison]
    """The held-out comparisons in the policy's tokens."""
    ceiling: float | None
    """The accuracy of the gold reward on the held-out labels; None where there is none."""


class Assembler:
    """Makes the objects of one run; those that stages share are made once."""

    def __init__(
        self,
        config: Config,
        fault: str | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        objects: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Raises a QuartetError for anything that the config names and that cannot be used: files,
        folders, packages, devices."""
        self.config, self.fault, self.process_group = config, fault, process_group
        if config.policy.adapter is not None and importlib.util.find_spec("peft") is None:
            raise AdapterError(f"policy.adapter needs the package peft: {install_command('lora')}.")
        if config.policy.quantize is not None:
            bitsandbytes()  # raises without it
        _check_optimizers(config)
        check_trackers(config.run.track)
        data = config.data
        self.world: World | None = (
            make_world(data.world, config.seed, data.texts) if data.world else None
        )
        self.rows = Rows(config, self.world)
        self.rows.check_files()
        self.device = device(config.run.device, process_group)
        self._check_ranks()
        if self.device.type == "cuda" and not has_trust_region(config):
            # What stays in float32 on a GPU takes its tensor cores: 10 bits of each factor.
            torch.set_float32_matmul_precision("high")
        self.policy_model = resolved_model("policy.model", config.policy.model)
        self.sources = [with_resolved_models(source) for source in config.reward]
        self.tokenizer = self._tokenizer()
        if config.policy.chat_template:
            set_chat_template(self.tokenizer, config.policy.chat_template)
        set_template_variables(self.tokenizer, config.policy.chat_template_kwargs)
        self.models = Models(config, self.policy_model, self.tokenizer, self.device, process_group)
        longest = self.models.longest_sequence()
        self.encoder = self._encoder(longest)
        check_models(self.models)
        self.micro_batch_tokens = self._micro_batch_tokens()
        self.scoring_tokens = scoring_tokens(config, self.micro_batch_tokens)
        texts = TokenTexts(self.tokenizer)
        self.rewards = RewardMaker(
            RewardContext(
                self.tokenizer,
                lambda ids: [texts[i] for i in ids],
                self.scoring_tokens,
                self.device,
                self.models.dtype("reward_model"),
                self.world.gold if self.world else None,
                objects=objects,
            )
        )
        if config.reads("reward"):
            per_token = config.algorithm is not None and config.algorithm.needs_token_scores
            reads_text = self.models.text_reader is not None
            backbone = self.models.trained_backbone if reads_text else None
            self.rewards.check(self.sources, per_token, backbone)
        self.round = ONLY_ROUND
        self.lengths: list[str] = []
        """A sentence about the steps of each stage whose length is given in epochs."""
        self.critic_init = self._critic_init()
        self.generators = Generators(config, self.tokenizer, longest, self.world)

    def in_round(self, number: int) -> "Assembler":
        """Return what makes the objects of a round of the recipe. They draw other random numbers in
        each round, and later ones start from the policy of the round before."""
        self.prompts  # read once, for all rounds  # noqa: B018
        own = copy.copy(self)
        own.round = Round(number, self.config.num_rounds)
        own.config = replace(self.config, seed=self.config.seed + ROUND_SEEDS * (number - 1))
        own.models = self.models.in_round(own.round, own.config)
        own.generators = copy.copy(self.generators)
        own.generators.config = own.config
        return own

    def _check_ranks(self) -> None:
        launch, group = self.config.launch, self.process_group
        world_size = group.world_size
        if isinstance(group, TorchProcessGroup) and world_size % launch.parts(world_size):
            raise ModelError(
                f"launch.shard = {launch.shard}: there are {world_size} ranks, which is no "
                "multiple of it, so some would have no part."
            )
        on_gpus = self.device.type == "cuda" and launch.type == "local"
        if on_gpus and world_size > torch.cuda.device_count():
            raise ModelError(
                f"launch.processes = {world_size}: each rank takes a GPU of its own, and this "
                f"machine has {torch.cuda.device_count()}. For ranks on the CPU set "
                'run.device = "cpu".'
            )

    def _tokenizer(self) -> Any:
        policy = self.config.policy
        if isinstance(policy.tokenizer, TrainTokenizer):
            return train_tokenizer(self.rows.texts(), policy.tokenizer.vocab_size)
        if policy.tokenizer is not None:
            return load_tokenizer(policy.tokenizer)
        if self.policy_model is not None:
            return load_tokenizer(self.policy_model)
        assert self.world is not None
        return self.world.tokenizer()

    def _encoder(self, longest: int) -> Encoder:
        """Return the encoder of the data. `longest` is how many tokens the policy reads at most."""
        config = self.config
        generates = config.reads("rollout")
        sampled = config.rollout.max_new_tokens * generates
        room = longest - sampled
        of_model = config.policy.model or "policy.create.max_length"
        if room < 1:
            raise ModelError(
                f"rollout.max_new_tokens = {sampled}: leaves no room for a prompt, "
                f"{config.policy.model or 'the new policy'} reads at most {longest} tokens."
            )
        limit = f"{longest:,} ({of_model})"
        if generates:
            limit = f"{room:,} = {limit} - {sampled:,} (rollout.max_new_tokens)"
        return Encoder(
            self.tokenizer,
            max_prompt_tokens=min(config.data.max_prompt_tokens, room),
            max_response_tokens=config.data.max_response_tokens,
            max_tokens=longest,
            prompt_limit=limit if room < config.data.max_prompt_tokens else "",
            unusable=config.data.unusable,
            too_long=config.data.too_long,
        )

    def _micro_batch_tokens(self) -> int:
        """Return how many tokens one forward pass takes. All ranks must choose the same number, so
        several go by the total memory of their GPUs: the free memory differs by a few bytes."""
        world_size, memory = self.process_group.world_size, None
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[world_size > 1]
        return micro_batch_tokens(self.config, memory, world_size, len(self.tokenizer))

    def _policy_parameters(self) -> int | None:
        return policy_parameters(self.config, len(self.tokenizer))

    def _critic_init(self) -> str | None:
        """Return what a separate critic starts from: "policy", a folder, or None for the first
        reward model that this run trains."""
        config = self.config
        source = next(
            (s for s in self.sources if isinstance(s, ModelSource) or is_trained_here(s)), None
        )
        folder = source.model if isinstance(source, ModelSource) else None
        label = source.label if isinstance(source, ModelSource) else None
        has_critic = config.algorithm is not None and config.algorithm.needs_critic
        if not isinstance(config.critic, SeparateCritic) or not has_critic:
            return "policy"
        init = config.critic.init
        if init not in {None, "reward_model"}:
            return init if init == "policy" else resolved_model("critic.init", init)
        on_its_trunk = config.policy.adapter is not None and init is None
        backbone = folder or self.models.trained_backbone
        if source is None or (backbone is not None and on_its_trunk):
            return "policy"
        reads_ids = (
            self.models.text_reader is None
            if folder is None
            else self.rewards.context.reads_ids(folder, label)
        )
        if reads_ids:
            return folder
        if init == "reward_model":
            raise ModelError(
                f'critic.init = "reward_model": {backbone} does not read the policy\'s tokens, '
                'so it cannot value them. Use "policy".'
            )
        return "policy"

    @cached_property
    def comparisons(self) -> Comparisons:
        """The comparisons that reward models are trained on."""
        path = self.config.reward_model.data
        train, held_out = self.rows.read("comparisons", path)
        ceiling = None if self.world is None or path else gold_accuracy(self.world, held_out)
        return self._encoded(train, held_out, ceiling)

    def labelled(self, folder: Path) -> Comparisons:
        """Return the comparisons that the stage `label` left in a run's folder."""
        place = self.round.folder(folder)
        return self._encoded(*self.rows.read_labels(place / "comparisons"), None)

    def _encoded(
        self, train: Sequence[Example], held_out: Sequence[Example], ceiling: float | None
    ) -> Comparisons:
        reader = self.models.text_reader
        if reader is None:
            records = self.encoder.comparisons(train), self.encoder.comparisons(held_out)
            return Comparisons(*records, records[1], ceiling)
        own, _ = self.encoder.comparisons_for(reader, train)
        own_held_out, policys = self.encoder.comparisons_for(reader, held_out)
        return Comparisons(own, own_held_out, policys, ceiling)

    @cached_property
    def prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """The prompts to train on and those held out, each with the columns that the rewards
        compare responses with."""
        train, held_out = self.rows.read("prompts")
        prompts = self.encoder.prompts(train), self.encoder.prompts(held_out)
        plain = next((p for p in prompts[0] if p.messages is None), None)
        if self.generators.environment is not None:
            if plain is not None:
                raise DataError(
                    f"{plain.id}: is plain text, and an environment speaks in conversations. Give "
                    "the rows messages."
                )
            check_second_turn(self.tokenizer, prompts[0][0])
        if self.config.reads("reward"):
            self.rewards.check_prompts(chain(*prompts), self.sources)
        return prompts

    @property
    def has_llm_judge(self) -> bool:
        """Whether a reward asks an LLM judge, which costs money per question."""
        return any(isinstance(source, JudgeSource) for source in self.sources)

    @property
    def placement(self) -> Placement:
        """Where models and optimizer states are while they are not used."""
        offloads = self.config.run.offload and self.device.type != "cpu"
        return Offloading(self.device) if offloads else NO_OFFLOAD

    def weighted_rewards(
        self,
        folder: Path,
        reward_models: Sequence[ScalarModel] = (),
        process_group: ProcessGroup = SINGLE_PROCESS,
        placement: Placement = NO_OFFLOAD,
    ) -> list[Weighted]:
        """Return the rewards of a stage. `reward_models` are the run's own where they are loaded
        already, `process_group` the ranks that ask for scores together."""
        trained: Sequence[Path | ScalarModel] = reward_models
        if not reward_models:
            place = self.round.folder(folder)
            trained = [place / name for name in self.config.reward_models]
        load = partial(self.models.load_scalar, role="reward_model", process_group=process_group)
        rewards = []
        for source in self.sources:
            reward = self.rewards.make(source, trained, folder, load)
            reward = self._distributed(reward, process_group, placement)
            rewards.append(Weighted(reward, source.weight))
        gold = self.rewards.context.gold
        if gold is not None and "gold" not in {source.called for source in self.sources}:
            rewards.append(
                Weighted(TextReward("gold", gold), weight=0.0)
            )  # recorded, not trained on
        return rewards

    def _distributed(
        self, reward: Reward, process_group: ProcessGroup, placement: Placement
    ) -> Reward:
        """Return the reward as a group of ranks asks for it: each rank runs a reward model on its
        share of the rollouts, other rewards are asked by one rank."""
        if isinstance(reward, ModelReward) and process_group is not SINGLE_PROCESS:
            reward.process_group = process_group
        for member in reward.members if isinstance(reward, EnsembleReward) else [reward]:
            if not isinstance(member, ModelReward | TextModelReward | StepReward):
                continue
            if not isinstance(member.model, AdaptedScalar):
                member.placement = placement
                placement.register(member.model)
        return shared(reward, process_group)

    def notes(self) -> list[str]:
        """Return sentences about what the user should know before the run starts."""
        config = self.config
        notes = [*self.lengths, *self.rows.notes, *self.rewards.notes, *self.encoder.notes()]
        if LABEL.name in config.recipe and config.label.simulated is None:
            notes.append(
                f"the run waits at the stage label for {config.label.labels:,} labels: quartet "
                "label RUN, with the folder above, in another terminal."
            )
        if config.rl_stage and config.rollout.filters and not config.rollout.keep_mask:
            notes.append(
                f"rollout.{config.rollout.filter_setting} samples another distribution than is "
                "trained: ratios do not start at 1, and KL estimates can be negative. "
                "rollout.keep_mask = true trains what is sampled."
            )
        if config.rl_stage and isinstance(config.generator, Servers) and config.generator.sleeps:
            notes.append(
                "generator.sleep = true leaves the servers asleep when the run ends: POST /wake_up "
                "wakes them."
            )
        if config.run.offload and self.device.type == "cpu":
            notes.append(
                "run.offload = true moves nothing here: the models are in main memory already."
            )
        if config.run.device == "auto" and (sentence := unused_gpu(self.device)) is not None:
            notes.append(sentence)
        if (sentence := self.models.slow_path()) is not None:
            notes.append(sentence)
        if (sentence := high_rates(config, self._policy_parameters())) is not None:
            notes.append(sentence)
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            notes.append(
                "the tokenizer pads with its end-of-sequence token; masks come from lengths, so "
                "nothing is lost."
            )
        return notes


def high_rates(config: Config, parameters: int | None) -> str | None:
    """Return a sentence where all weights of a pretrained model are trained at rates that fit
    adapters, or small models from random weights. `parameters` is the model's number of them,
    None where it is not known."""
    policy = config.policy
    is_small = parameters is not None and parameters < PRETRAINED
    if policy.model is None or policy.adapter is not None or is_small:
        return None
    rates = []
    for table, settings in config.optimizers():
        # A class of the user's own may have settings without a default.
        defaults = OptimizerConfig() if isinstance(settings, StageSource) else type(settings)()
        for name in () if settings.optimizer == "muon" else ("lr", "critic_lr"):
            rate, default = getattr(settings, name, 0.0), getattr(defaults, name, 0.0)
            if rate > HIGH_RATE * default * (1 + 1e-9):  # 1e-5 is not ten times 1e-6 in binary
                rates.append(f"{table}.{name} = {rate:g} (default {default:g})")
    if not rates:
        return None
    return (
        f"{', '.join(dict.fromkeys(rates))}: high for all weights of a pretrained model, which "
        "forgets what it knew. Lower it, or train an adapter: policy.adapter.type=lora."
    )


def _check_optimizers(config: Config) -> None:
    """Raise `OptimizerError` unless the packages of the recipe's optimizers are installed."""
    for table, settings in config.optimizers():
        package = TYPES[settings.optimizer].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise OptimizerError(
                f'{table}.optimizer = "{settings.optimizer}" needs the package {package}: '
                f"{install_command(package)}."
            )
