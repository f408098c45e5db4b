"""From a config to objects: the one folder that knows every implementation."""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.preference import PREFERENCES, Kto
from quartet.algorithms.update import TrustRegion
from quartet.assembly.data import Rows, fingerprints
from quartet.assembly.generators import Generators
from quartet.assembly.models import Models, device, existing, with_existing_models
from quartet.assembly.rewards import RewardMaker
from quartet.config.tables import (
    Config,
    Preference,
    RewardModel,
    SeparateCritic,
    Servers,
    Sft,
    SharedCritic,
    TrainTokenizer,
    json_ready,
)
from quartet.data import DataError
from quartet.data.encoding import Encoder, first_of
from quartet.data.examples import Example
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.data.shapes import Purpose
from quartet.data.tokenizer import train_tokenizer
from quartet.distributed.offload import NO_OFFLOAD, Offloading, Placement
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.distributed.sharding import GatheredWeights
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator, Weights
from quartet.loops.collect import Collector
from quartet.loops.preference import OnlinePairs
from quartet.models.actor_critic import ActorCritic, Separate, Shared
from quartet.models.adapters import CRITIC, REWARD, AdapterError, copy_adapter, reference_of
from quartet.models.chat import set_chat_template
from quartet.models.heads import AdaptedScalar, ScalarModel, ValueHead, attach
from quartet.models.language_model import ModelError, load_model, load_tokenizer
from quartet.planning.memory import micro_batch_tokens, policy_parameters
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import check_trackers
from quartet.rewards.combine import EnsembleReward
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Reward, Weighted, rewarded
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.shared import shared
from quartet.rewards.source import RewardContext
from quartet.rewards.sources import JudgeSource, ModelSource
from quartet.rewards.text_models import StepReward, TextModelReward
from quartet.runtime.faults import FAULTS
from quartet.runtime.job import Job
from quartet.stages.evaluation import EvaluationStage
from quartet.stages.preference import PreferenceStage
from quartet.stages.protocol import Stage
from quartet.stages.reward_model import RewardModelStage
from quartet.stages.rl import RLComponents, RLStage, WinRateProbe
from quartet.stages.sft import SftStage
from quartet.training.checkpoint import GlobalRandom
from quartet.training.learner import Learner
from quartet.training.optim import Optimizer
from quartet.training.trust_region import TrustRegionLearner
from quartet.worlds import WORLDS, World

PROBES = 8
"""How many answers are looked at again and again as an RL stage goes on."""

CONTEST_PROMPTS = 32
"""How many held-out prompts the win rate is taken on as an RL stage goes on."""

WATCHED_TEXTS = 32
"""How many held-out demonstrations an RL stage takes the policy's perplexity on."""
CENTRING_PROMPTS = 256
"""How many of the training prompts are answered to find a reward model's mean score."""


def build(
    config: Config, fault: str | None = None, process_group: ProcessGroup = SINGLE_PROCESS
) -> Job:
    """Read and check the data, and make the stages. Models are loaded when their stage starts; what
    they are loaded from is checked now. `fault`: a mistake to plant in the RL stage, see
    `faults.py`. `process_group`: the ranks that do the same."""
    GlobalRandom().seed(config.seed)
    workshop = Workshop(config, fault, process_group)
    stages = [workshop.stage(name) for name in config.recipe]
    complete = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, staleness=config.staleness)
    )
    made_with = {"config": json_ready(complete), "data": fingerprints(config), "fault": fault}
    return Job(
        stages, workshop.tokenizer, workshop.notes(), made_with, workshop.device, process_group
    )


class Workshop:
    """Makes the objects of one run, each of the shared ones once."""

    def __init__(
        self, config: Config, fault: str | None = None, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.fault, self.process_group = fault, process_group
        if config.policy.adapter is not None and importlib.util.find_spec("peft") is None:
            raise AdapterError(
                'policy.adapter needs the package peft: pip install "quartet-rlhf[lora]".'
            )
        check_trackers(config.run.track)
        self.config = config
        self.world: World | None = (
            WORLDS[config.data.world](config.seed) if config.data.world else None
        )
        self.rows = Rows(config, self.world)
        self.device = device(config.run.device, process_group)
        if isinstance(
            process_group, TorchProcessGroup
        ) and process_group.world_size % config.launch.parts(process_group.world_size):
            raise ModelError(
                f"launch.shard = {config.launch.shard}: there are {process_group.world_size} ranks, which is no "
                f"multiple of it, so "
                "some would have no part."
            )
        if (
            self.device.type == "cuda"
            and config.launch.type == "local"
            and process_group.world_size > torch.cuda.device_count()
        ):
            raise ModelError(
                f"launch.processes = {process_group.world_size}: each rank takes a GPU of its own, and this "
                f"machine has "
                f'{torch.cuda.device_count()}. For ranks on the CPU set run.device = "cpu".'
            )
        self.policy_model = existing("policy.model", config.policy.model)
        self.sources = [with_existing_models(source) for source in config.reward]
        self.tokenizer = self._tokenizer()
        if config.policy.chat_template:
            set_chat_template(self.tokenizer, config.policy.chat_template)
        self.models = Models(config, self.policy_model, self.tokenizer, self.device, process_group)
        longest = self.models.longest_sequence()
        generates = set(config.recipe) != {"sft"}
        room = longest - config.rollout.max_new_tokens * generates
        if room < 1:
            raise ModelError(
                f"rollout.max_new_tokens = {config.rollout.max_new_tokens}: leaves no room for a "
                f"prompt, {config.policy.model} "
                f"reads at most {longest} tokens."
            )
        self.encoder = Encoder(
            self.tokenizer,
            max_prompt_tokens=min(config.data.max_prompt_tokens, room),
            max_response_tokens=config.data.max_response_tokens,
            max_tokens=longest,
            unusable=config.data.unusable,
        )
        self.models.check()
        # Ranks must choose alike: several go by what their GPUs have in all, which is not free to
        # the same byte on each.
        memory = (
            torch.cuda.mem_get_info(self.device)[process_group.world_size > 1]
            if self.device.type == "cuda"
            else None
        )
        self.micro_batch_tokens = micro_batch_tokens(
            config, policy_parameters(config, len(self.tokenizer)), memory, process_group.world_size
        )
        texts, gold = TokenTexts(self.tokenizer), self.world.gold if self.world else None
        self.rewards = RewardMaker(
            RewardContext(
                self.tokenizer,
                lambda ids: [texts[i] for i in ids],
                self.micro_batch_tokens,
                self.device,
                gold,
            )
        )
        if config.reads("reward"):
            self.rewards.check(
                self.sources, bool(config.algorithm and config.algorithm.needs_token_scores)
            )
        self.critic_init = self._critic_init()
        self.generators = Generators(config, self.tokenizer, longest, self.world)

    def stage(self, name: str) -> Stage:
        match name:
            case "sft":
                return self.sft_stage()
            case "reward_model":
                return self.reward_model_stage()
            case "evaluation":
                return self.evaluation_stage()
            case _ if name in PREFERENCES:
                return self.preference_stage(name)
            case _:  # any preset
                return self.rl_stage()

    # --- stages
    # --------------------------------------------------------------------------------------------------------

    def sft_stage(self) -> SftStage:
        train, held_out = self.rows.read("demonstrations", self.config.sft.data)
        sft = self.config.sft
        return SftStage(
            demonstrations=self.encoder.demonstrations(train),
            held_out=self.encoder.demonstrations(held_out),
            tokenizer=self.tokenizer,
            load_policy=lambda _: self.models.learning(self.models.base()),
            optimizer=lambda model: stage_optimizer(model, sft),
            num_steps=sft.steps,
            batch_size=sft.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            process_group=self.process_group,
            spread=self.models.spread,
        )

    def reward_model_stage(self) -> RewardModelStage:
        settings = self.config.reward_model
        train, held_out = self.rows.read("comparisons", settings.data)
        prompts = self.prompts[0]
        return RewardModelStage(
            comparisons=self.encoder.comparisons(train),
            held_out=self.encoder.comparisons(held_out),
            ceiling=self._ceiling(held_out),
            prompts=prompts[:CENTRING_PROMPTS],
            sampling=self.config.rollout,
            tokenizer=self.tokenizer,
            load_policy=self.models.before,
            make_model=self.models.judge_to_be,
            loss=settings.loss,
            optimizer=lambda model: stage_optimizer(model, settings),
            num_steps=settings.steps,
            batch_size=settings.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            process_group=self.process_group,
        )

    def preference_stage(self, name: str) -> PreferenceStage:
        settings, online = self.config.preference, name == "online_dpo"
        purpose: Purpose = "preferences" if isinstance(settings.loss, Kto) else "comparisons"
        train, held_out = ([], []) if online else self.rows.read(purpose, settings.data)
        prompts = self.prompts[0] if online else []

        def pairs(folder: Path, model: Any) -> OnlinePairs:
            sampled = self._sampled(model)
            generator = self.generators.native(
                sampled, self.process_group, copied=sampled is not model
            )
            sampler, rewards = (
                Sampler(prompts, settings.batch_size, self.config.seed),
                self._rewards(folder, process_group=self.process_group),
            )
            now = None if sampled is model else lambda: Weights(0, GatheredWeights(model))
            return OnlinePairs(sampler, generator, self.config.rollout, rewards, weights=now)

        return PreferenceStage(
            name=name,
            comparisons=self.encoder.comparisons(train) if train else [],
            held_out=self.encoder.comparisons(held_out) if held_out else [],
            online=pairs if online else None,
            tokenizer=self.tokenizer,
            load_policy=self.models.starting,
            loss=settings.loss,
            optimizer=lambda model: stage_optimizer(model, settings),
            num_steps=settings.steps,
            batch_size=settings.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            process_group=self.process_group,
            spread=self.models.spread,
        )

    def rl_stage(self) -> RLStage:
        config = self.config
        assert config.rl_stage and config.algorithm
        return RLStage(
            name=config.rl_stage,
            prompts=self.prompts[0],
            tokenizer=self.tokenizer,
            load_components=self._rl_components,
            algorithm=config.algorithm,
            sampling=config.rollout,
            samples_per_prompt=config.rollout.samples_per_prompt,
            prompts_per_step=config.rollout.prompts_per_step,
            num_steps=config.run.steps,
            seed=config.seed,
            staleness=config.staleness,
        )

    def evaluation_stage(self) -> EvaluationStage:
        return EvaluationStage(
            prompts=self.prompts[1][: self.config.evaluation.prompts],
            tokenizer=self.tokenizer,
            load_before=self.models.before,
            load_after=lambda folder: load_model(folder / "policy", self.device),
            rewards=self._rewards,
            gold=self.rewards.context.gold,
            sampling=self.config.rollout,
            micro_batch_tokens=self.micro_batch_tokens,
            generator=self.generators.examined,
            best_of=0
            if self._asks_a_judge
            else self.config.evaluation.best_of,  # some hundred questions more cost money
            process_group=self.process_group,
        )

    # --- who plays in RL
    # ---------------------------------------------------------------------------------------------

    def _sampled(self, actor: Any) -> Any:
        """The model that answers are sampled with. Sampling reads all weights at every token: where
        the actor will be in parts, or learns meanwhile, it is a copy."""
        return copy.deepcopy(actor) if self.config.launch.shard or self.config.staleness else actor

    def _rl_components(self, folder: Path) -> RLComponents:
        config = self.config
        assert config.algorithm
        actor = self.models.starting(folder)
        reference = reference_of(actor) if config.algorithm.needs_reference else None
        # Where servers write the answers, only a judge on the policy's trunk needs a model that
        # does not learn meanwhile.
        served = isinstance(config.generator, Servers) and not self._attaches_judge(folder)
        sampled = actor if served else self._sampled(actor)
        judge = self._attached_judge(sampled, folder)
        models = (
            self._actor_critic(actor, judge, folder)
            if config.algorithm.needs_critic
            else Separate(actor, None)
        )
        self.models.spread(actor)
        meanwhile = self.process_group.clone() if config.staleness else self.process_group
        reference = None if reference is None else self.models.spread(reference)
        placement = self._placement()
        make = TrustRegionLearner if isinstance(config.algorithm.update, TrustRegion) else Learner
        learner = make(
            models,
            reference,
            config.optim,
            config.rollout,
            config.run.steps,
            config.seed,
            self._pretraining(config.algorithm),
            self.micro_batch_tokens,
            self.process_group,
            placement,
        )
        rewards = self._rewards(folder, judge, meanwhile, placement)
        if servers := self.generators.servers(actor, folder, meanwhile):
            generator = self.generators.asked(servers, meanwhile)
            aside = lambda: self.generators.asked(servers.aside(), self.process_group)  # noqa: E731
        else:
            generator = self.generators.native(sampled, meanwhile, copied=sampled is not actor)
            aside = lambda: self.generators.native(sampled, self.process_group)  # noqa: E731
        probes, win_rate_probe = self._probes(aside, rewards), self._win_rate_probe(aside, rewards)
        components = RLComponents(
            learner, generator, rewards, probes, self._watched_texts(), win_rate_probe
        )
        if self.fault is not None:
            FAULTS[self.fault](components)
        return components

    def _probes(
        self, generator: Callable[[], Generator], rewards: Sequence[Weighted]
    ) -> list[Rollout]:
        """Answers to held-out prompts; the policy's training draws no random number less for
        them."""
        rollout, algorithm = self.config.rollout, self.config.algorithm
        assert algorithm
        prompts = list(self.prompts[1][: max(1, PROBES // rollout.samples_per_prompt)])
        sampler = Sampler(self.prompts[0], 1, self.config.seed)
        collector = Collector(sampler, generator(), rewards, rollout.samples_per_prompt)
        return [r for r in collector.respond(prompts, algorithm, rollout) if r.score is not None]

    def _win_rate_probe(
        self, generator: Callable[[], Generator], rewards: Sequence[Weighted]
    ) -> WinRateProbe | None:
        """None where a judge would have to be paid for it."""
        if self._asks_a_judge:
            return None
        prompts = list(self.prompts[1][:CONTEST_PROMPTS])

        def answer() -> Sequence[Rollout]:
            return rewarded(generator().generate(prompts, self.config.rollout), rewards)

        return WinRateProbe(answer, answer(), self.rewards.context.gold)

    @property
    def _asks_a_judge(self) -> bool:
        return any(isinstance(source, JudgeSource) for source in self.sources)

    def _watched_texts(self) -> Sequence[Demonstration]:
        """Of those that SFT did not see."""
        if "sft" not in self.config.recipe:
            return []
        return self.encoder.demonstrations(
            self.rows.read("demonstrations", self.config.sft.data)[1]
        )[:WATCHED_TEXTS]

    def _attached_judge(self, actor: Any, folder: Path) -> AdaptedScalar | None:
        """The run's own reward model as an adapter on the actor's trunk, where it was trained as
        one on the same."""
        return (
            attach(actor, REWARD, folder / "reward_model" / "adapter")
            if self._attaches_judge(folder)
            else None
        )

    def _attaches_judge(self, folder: Path) -> bool:
        wanted = any(isinstance(s, ModelSource) and s.model is None for s in self.sources)
        return (
            self.config.policy.adapter is not None
            and wanted
            and (folder / "reward_model" / "adapter").is_dir()
        )

    def _pretraining(self, algorithm: Algorithm) -> Sampler[Demonstration] | None:
        """What PTX reads: texts of their own, or the run's demonstrations."""
        if algorithm.ptx.coef == 0:
            return None
        texts, _ = self.rows.read(
            "demonstrations", self.config.data.pretraining or self.config.sft.data
        )
        return Sampler(
            self.encoder.demonstrations(texts), algorithm.ptx.batch_size, self.config.seed
        )

    def _actor_critic(self, actor: Any, judge: AdaptedScalar | None, folder: Path) -> ActorCritic:
        match self.config.critic:
            case SharedCritic():
                return Shared(
                    actor, ValueHead(actor.config.get_text_config().hidden_size).to(self.device)
                )
            case SeparateCritic():
                if judge is not None and self.critic_init is None:
                    return Separate(
                        actor, self.models.spread_scalar(self._critic_like(judge, actor))
                    )
                if self.critic_init == "policy":
                    return Separate(
                        actor, self.models.spread_scalar(self.models.new_scalar(actor, CRITIC))
                    )
                critic = ScalarModel.load(self.critic_init or folder / "reward_model", self.device)
                self.models.set_up(critic.model)
                return Separate(actor, self.models.spread_scalar(critic))

    def _critic_like(self, judge: AdaptedScalar, actor: Any) -> ScalarModel:
        """A critic on the same trunk that begins as the reward model."""
        critic = self.models.new_scalar(actor, CRITIC)
        copy_adapter(judge.under.model, REWARD, actor, CRITIC)
        critic.head.load_state_dict(judge.head.state_dict())
        critic.centre = judge.centre
        return critic

    def _critic_init(self) -> str | None:
        """What a separate critic starts from: "policy", a folder, or None for the reward model that
        this run trains."""
        config, source = (
            self.config,
            next((s for s in self.sources if isinstance(s, ModelSource)), None),
        )
        if not isinstance(config.critic, SeparateCritic) or not (
            config.algorithm and config.algorithm.needs_critic
        ):
            return "policy"
        init = config.critic.init
        if init not in {None, "reward_model"}:
            return init if init == "policy" else existing("critic.init", init)
        on_its_trunk = config.policy.adapter is not None and init is None
        if source is None or (source.model is not None and on_its_trunk):
            return "policy"
        if source.model is None or self.rewards.context.reads_ids(source.model, source.label):
            return source.model
        if init == "reward_model":
            raise ModelError(
                f'critic.init = "reward_model": {source.model} does not read the policy\'s tokens, '
                f"so it cannot value them. "
                'Use "policy".'
            )
        return "policy"

    def _placement(self) -> Placement:
        return (
            Offloading(self.device)
            if self.config.run.offload and self.device.type != "cpu"
            else NO_OFFLOAD
        )

    def _rewards(
        self,
        folder: Path,
        judge: ScalarModel | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        placement: Placement = NO_OFFLOAD,
    ) -> list[Weighted]:
        """`judge`: the run's own reward model, where it is loaded already. `process_group`: the ranks that
        ask for them together."""
        trained = judge or folder / "reward_model"
        rewards = [
            Weighted(
                self._for_all(self.rewards.make(source, trained, folder), process_group, placement),
                source.weight,
            )
            for source in self.sources
        ]
        if self.rewards.context.gold is not None and "gold" not in {
            source.called for source in self.sources
        }:
            rewards.append(
                Weighted(TextReward("gold", self.rewards.context.gold), weight=0.0)
            )  # seen, not trained on
        return rewards

    def _for_all(self, reward: Reward, process_group: ProcessGroup, placement: Placement) -> Reward:
        """The reward as a team asks for it; a reward model is read by all, each its share, and may
        be in parts."""
        if isinstance(reward, ModelReward) and process_group is not SINGLE_PROCESS:
            reward.process_group = process_group
            if not isinstance(reward.model, AdaptedScalar):  # else its trunk is the sampler's
                self.models.spread_scalar(reward.model, process_group)
        for one in reward.members if isinstance(reward, EnsembleReward) else [reward]:
            if isinstance(one, ModelReward | TextModelReward | StepReward) and not isinstance(
                one.model, AdaptedScalar
            ):
                one.placement = placement
                placement.register(one.model)
        return shared(reward, process_group)

    # --- data
    # ----------------------------------------------------------------------------------------------------------

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

    @cached_property
    def prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """To train on, and held out; each with what the rewards compare answers with."""
        train, held_out = self.rows.read("prompts")
        prompts = self.encoder.prompts(train), self.encoder.prompts(held_out)
        plain = next((p for p in prompts[0] if p.messages is None), None)
        if self.generators.environment is not None and plain is not None:
            raise DataError(
                f"{plain.id}: is plain text, and an environment speaks in conversations. Give the "
                f"rows messages."
            )
        if self.config.reads("reward"):
            self.rewards.check_prompts(chain(*prompts), self.sources)
        return prompts

    def _ceiling(self, comparisons: Sequence[Example]) -> float | None:
        """How often a judge who knows the gold reward agrees with these labels."""
        if self.world is None or self.config.reward_model.data is not None:
            return None
        right = [
            self.world.gold(str(c.prompt), str(c.chosen))
            > self.world.gold(str(c.prompt), str(c.rejected))
            for c in comparisons
        ]
        return sum(right) / len(right)

    def notes(self) -> list[str]:
        notes = list(self.rewards.notes)
        if self.encoder.dropped:
            count = len(self.encoder.dropped)
            notes.append(
                f"{count:,} rows cannot be used and were left out, the first: "
                f"{first_of(self.encoder.dropped)}"
            )
        if self.config.rl_stage and self.config.rollout.filters:
            notes.append(
                "rollout.top_k and rollout.top_p sample another distribution than is trained: "
                "ratios do not start at 1, "
                "and KL estimates can be negative."
            )
        if self.config.run.offload and self.device.type == "cpu":
            notes.append(
                "run.offload = true moves nothing here: the models are in main memory already."
            )
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            notes.append(
                "the tokenizer pads with its end-of-sequence token; masks come from lengths, so "
                "nothing is lost."
            )
        return notes


def stage_optimizer(model: Any, settings: Sft | RewardModel | Preference) -> Optimizer:
    return Optimizer([p for p in model.parameters() if p.requires_grad], settings, settings.steps)
