"""From a config to objects: the one file that knows every implementation."""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.preference import PREFERENCES, Kto
from quartet.algorithms.update import TrustRegion
from quartet.build.data import Rows, fingerprints
from quartet.build.rewards import RewardMaker
from quartet.config import (
    Config,
    Preference,
    RewardModel,
    Run,
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
from quartet.experience import Prompt, Rollout
from quartet.faults import FAULTS
from quartet.generation.dialects import DIALECTS
from quartet.generation.episodes import Environment, Episodes
from quartet.generation.led import Led
from quartet.generation.native import NativeGenerator
from quartet.generation.protocol import Generator, Weights
from quartet.generation.servers import ServedGenerator
from quartet.loops.collect import answers
from quartet.loops.preference import OnlinePairs
from quartet.memory import micro_batch_tokens, policy_parameters
from quartet.models.actor_critic import ActorCritic, Separate, Shared, pad_token_id
from quartet.models.adapters import (
    CRITIC,
    POLICY,
    REWARD,
    AdapterError,
    adapters_of,
    add_adapter,
    copy_adapter,
    freeze_layers,
    in_adapter,
    merged_state,
    reference_of,
    save_adapter,
    working,
)
from quartet.models.chat import set_chat_template
from quartet.models.heads import AdaptedScalar, ScalarModel, ValueHead, attach
from quartet.models.language_model import (
    ModelError,
    create,
    load_model,
    load_tokenizer,
    read_config,
    stop_ids,
)
from quartet.models.llama import FAMILY
from quartet.models.trunk import checkpoint_blocks, compile_blocks
from quartet.observability.sinks import check_trackers
from quartet.observability.tokens import TokenTexts
from quartet.pipeline import Saving
from quartet.placement import STAYS, Offloading, Placement
from quartet.rewards.combine import EnsembleReward
from quartet.rewards.functions import TextReward, check_reference
from quartet.rewards.protocol import Reward, RewardError, Weighted, rewarded
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.shared import shared
from quartet.rewards.sources import EnsembleSource, JudgeSource, ModelSource, Source, StepsSource
from quartet.rewards.text_models import StepReward, TextModelReward
from quartet.rewards.worker import load
from quartet.stages import Cast, Contest, EvaluationStage, PreferenceStage, RewardModelStage, RLStage, SftStage, Stage
from quartet.team import ALONE, Gathered, Team, Together, is_sharded
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


@dataclass(frozen=True)
class Job:
    """A run, ready to start: nothing on disk has been touched yet."""

    stages: list[Stage]
    tokenizer: Any
    notes: list[str]
    """What a person should know before it starts."""
    made_with: dict[str, Any]
    """What a resumed run must have in common with this one."""
    device: torch.device
    """Where the models are."""
    team: Team = ALONE

    def saving(self, run: Run) -> Saving:
        return Saving(run.keep_every, run.checkpoint_every, run.keep_last, run.keep_best, run.rollbacks, self.made_with)


def build(config: Config, fault: str | None = None, team: Team = ALONE) -> Job:
    """Read and check the data, and make the stages. Models are loaded when their stage starts; what they are loaded from
    is checked now. `fault`: a mistake to plant in the RL stage, see `faults.py`. `team`: the ranks that do the same."""
    GlobalRandom().seed(config.seed)
    workshop = Workshop(config, fault, team)
    stages = [workshop.stage(name) for name in config.recipe]
    made_with = {"config": json_ready(config), "data": fingerprints(config), "fault": fault}
    return Job(stages, workshop.tokenizer, workshop.notes(), made_with, workshop.device, team)


class Workshop:
    """Makes the objects of one run, each of the shared ones once."""

    def __init__(self, config: Config, fault: str | None = None, team: Team = ALONE) -> None:
        self.fault, self.team = fault, team
        self.meshes: dict[Team, Any] = {}
        """What the models of a team are in parts over."""
        if config.policy.adapter is not None and importlib.util.find_spec("peft") is None:
            raise AdapterError('policy.adapter needs the package peft: pip install "quartet-rlhf[lora]".')
        check_trackers(config.run.track)
        self.config = config
        self.world: World | None = WORLDS[config.data.world](config.seed) if config.data.world else None
        self.rows = Rows(config, self.world)
        self.device = device(config.run.device, team)
        if isinstance(team, Together) and team.world % config.launch.parts(team.world):
            raise ModelError(
                f"launch.shard = {config.launch.shard}: there are {team.world} ranks, which is no multiple of it, so "
                "some would have no part."
            )
        if self.device.type == "cuda" and config.launch.type == "local" and team.world > torch.cuda.device_count():
            raise ModelError(
                f"launch.processes = {team.world}: each rank takes a GPU of its own, and this machine has "
                f'{torch.cuda.device_count()}. For ranks on the CPU set run.device = "cpu".'
            )
        self.policy_model = existing("policy.model", config.policy.model)
        self.sources = [with_existing_models(source) for source in config.reward]
        self.tokenizer = self._tokenizer()
        if config.policy.chat_template:
            set_chat_template(self.tokenizer, config.policy.chat_template)
        longest = self._longest_sequence()
        generates = set(config.recipe) != {"sft"}
        room = longest - config.rollout.max_new_tokens * generates
        if room < 1:
            raise ModelError(
                f"rollout.max_new_tokens = {config.rollout.max_new_tokens}: leaves no room for a prompt, {config.policy.model} "
                f"reads at most {longest} tokens."
            )
        self.encoder = Encoder(
            self.tokenizer,
            max_prompt_tokens=min(config.data.max_prompt_tokens, room),
            max_response_tokens=config.data.max_response_tokens,
            max_tokens=longest,
            unusable=config.data.unusable,
        )
        self._check_models()
        # Ranks must choose alike: several go by what their GPUs have in all, which is not free to the same byte on each.
        memory = torch.cuda.mem_get_info(self.device)[team.world > 1] if self.device.type == "cuda" else None
        self.micro_batch_tokens = micro_batch_tokens(config, policy_parameters(config, len(self.tokenizer)), memory, team.world)
        texts, gold = TokenTexts(self.tokenizer), self.world.gold if self.world else None
        self.rewards = RewardMaker(
            self.tokenizer, lambda ids: [texts[i] for i in ids], self.micro_batch_tokens, self.device, gold
        )
        if config.reads("reward"):
            self.rewards.check(self.sources, bool(config.algorithm and config.algorithm.needs_token_scores))
        self.critic_init = self._critic_init()
        self.environment = self._environment()

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

    # --- stages --------------------------------------------------------------------------------------------------------

    def sft_stage(self) -> SftStage:
        train, held_out = self.rows.read("demonstrations", self.config.sft.data)
        sft = self.config.sft
        return SftStage(
            demonstrations=self.encoder.demonstrations(train),
            held_out=self.encoder.demonstrations(held_out),
            tokenizer=self.tokenizer,
            load_policy=lambda _: self._learning(self._base_policy()),
            optimizer=lambda model: stage_optimizer(model, sft),
            num_steps=sft.steps,
            batch_size=sft.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            team=self.team,
            spread=self.spread,
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
            load_policy=self._plain_policy,
            make_model=self._judge_to_be,
            loss=settings.loss,
            optimizer=lambda model: stage_optimizer(model, settings),
            num_steps=settings.steps,
            batch_size=settings.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            team=self.team,
        )

    def preference_stage(self, name: str) -> PreferenceStage:
        settings, online = self.config.preference, name == "online_dpo"
        purpose: Purpose = "preferences" if isinstance(settings.loss, Kto) else "comparisons"
        train, held_out = ([], []) if online else self.rows.read(purpose, settings.data)
        prompts = self.prompts[0] if online else []

        def pairs(folder: Path, model: Any) -> OnlinePairs:
            sampled = self._sampled(model)
            generator = self._generator(sampled, self.team, copied=sampled is not model)
            sampler, rewards = Sampler(prompts, settings.batch_size, self.config.seed), self._rewards(folder, team=self.team)
            now = None if sampled is model else lambda: Weights(0, Gathered(model))
            return OnlinePairs(sampler, generator, self.config.rollout, rewards, weights=now)

        return PreferenceStage(
            name=name,
            comparisons=self.encoder.comparisons(train) if train else [],
            held_out=self.encoder.comparisons(held_out) if held_out else [],
            online=pairs if online else None,
            tokenizer=self.tokenizer,
            load_policy=self.starting_policy,
            loss=settings.loss,
            optimizer=lambda model: stage_optimizer(model, settings),
            num_steps=settings.steps,
            batch_size=settings.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            seed=self.config.seed,
            team=self.team,
            spread=self.spread,
        )

    def rl_stage(self) -> RLStage:
        config = self.config
        assert config.rl_stage and config.algorithm
        return RLStage(
            name=config.rl_stage,
            prompts=self.prompts[0],
            tokenizer=self.tokenizer,
            cast=self._cast,
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
            load_before=self._plain_policy,
            load_after=lambda folder: load_model(folder / "policy", self.device),
            rewards=self._rewards,
            gold=self.rewards.gold,
            sampling=self.config.rollout,
            micro_batch_tokens=self.micro_batch_tokens,
            generator=self._examined,
            best_of=0 if self._asks_a_judge else self.config.evaluation.best_of,  # some hundred questions more cost money
            team=self.team,
        )

    # --- models --------------------------------------------------------------------------------------------------------

    def _base_policy(self) -> Any:
        """The model that the run begins with."""
        policy = self.config.policy
        if policy.create is not None:
            return self._set_up(create(policy.create, self.tokenizer, self.config.seed).to(self.device))
        return self._set_up(load_model(str(self.policy_model), self.device))

    def _plain_policy(self, folder: Path) -> Any:
        """The policy that RL starts from, and is held to: the run's own SFT model where it made one."""
        if "sft" not in self.config.recipe:
            return self._base_policy()
        return self._set_up(load_model(folder / "sft", self.device))

    def starting_policy(self, folder: Path) -> Any:
        """The same, as it will learn."""
        return self._learning(self._plain_policy(folder))

    def _learning(self, model: Any) -> Any:
        """Under an adapter, or with its first layers frozen, where the config says so."""
        policy = self.config.policy
        if policy.adapter is not None:
            return add_adapter(model, policy.adapter, POLICY, self.config.seed)
        return freeze_layers(model, policy.frozen_layers)

    def _set_up(self, model: Any) -> Any:
        """Its blocks as they are to run."""
        policy = self.config.policy
        if policy.gradient_checkpointing:
            checkpoint_blocks(model)
        return compile_blocks(model) if policy.compile else model

    def _new_scalar(self, policy: Any, adapter: str) -> ScalarModel:
        """A new head, on a copy of the policy's trunk or, where the policy is an adapter, on another adapter beside it."""
        pad, seed, lora = pad_token_id(self.tokenizer), self.config.seed, self.config.policy.adapter
        if lora is not None:
            return AdaptedScalar(add_adapter(policy, lora, adapter, seed), adapter, pad, seed)
        made = ScalarModel.from_trunk(policy, pad, seed, share_frozen=self.config.policy.frozen_layers > 0)
        self._set_up(made.model)
        return made

    def _judge_to_be(self, policy: Any) -> ScalarModel:
        """A reward model to be trained. The policy will write answers for it, so a trunk that goes into parts is a copy."""
        trunk = copy.deepcopy(policy) if self.config.launch.shard and self.config.policy.adapter is not None else policy
        return self._spread_scalar(self._new_scalar(trunk, REWARD))

    def spread(self, model: Any, team: Team | None = None) -> Any:
        """In parts over the ranks, where the config says so. `team`: who puts it together, if not the run's own."""
        team = team or self.team
        if not self.config.launch.shard or not isinstance(team, Together) or any(map(is_sharded, model.parameters())):
            return model
        from quartet.training.parallelize import mesh_of, parallelize

        if team not in self.meshes:
            self.meshes[team] = mesh_of(self.device.type, team, self.config.launch.parts(team.world))
        return parallelize(model, self.meshes[team])

    def _spread_scalar(self, scalar: ScalarModel, team: Team | None = None) -> ScalarModel:
        if isinstance(scalar, AdaptedScalar):
            self.spread(scalar.under.model, team)
            scalar.look_again()
        else:
            self.spread(scalar.model, team)
        return scalar

    def _generator(self, model: Any, team: Team = ALONE, copied: bool = False) -> Generator:
        stops = stop_ids(model, self.tokenizer)
        return self._in_turns(NativeGenerator(model, self.tokenizer, stops, self.config.seed, team=team, copied=copied), team)

    def _in_turns(self, turns: Generator, team: Team) -> Generator:
        """Answers of one turn, or of several where there is an environment."""
        if self.environment is None:
            return turns
        make, max_turns = self.environment
        return Episodes(turns, self.tokenizer, make, max_turns, self.encoder.max_tokens, team)

    def _asked(self, servers: ServedGenerator, team: Team) -> Generator:
        """By one rank, where there are several. Adapters that go alone are all that is put together for a push."""
        only = partial(in_adapter, POLICY) if servers.save_base is not None else None
        return self._in_turns(servers if team is ALONE else Led(servers, team, only), team)

    def _examined(self, model: Any, folder: Path) -> Generator:
        """Answers of a model that learns no more; one rank asks."""
        servers = self._servers(model, folder, ALONE)
        return self._generator(model) if servers is None else self._asked(servers, ALONE)

    def _servers(self, actor: Any, folder: Path, team: Team) -> ServedGenerator | None:
        """Those of other processes, where the config names them; they are given the model's weights at once. Where it has an
        adapter, that may be all they are given later."""
        settings = self.config.generator
        if not isinstance(settings, Servers):
            return None
        adapter = settings.adapter and bool(adapters_of(actor))

        def write(place: Path, tensors: Mapping[str, Any]) -> None:
            if adapter:
                save_adapter(actor, POLICY, place, tensors)
            else:
                actor.save_pretrained(place, state_dict=merged_state(actor, tensors) if adapters_of(actor) else dict(tensors))
                self.tokenizer.save_pretrained(place)

        def write_base(place: Path, tensors: Mapping[str, Any]) -> None:
            with working(actor, None):
                actor.save_pretrained(place, state_dict=merged_state(actor, tensors))
            self.tokenizer.save_pretrained(place)

        made = ServedGenerator(
            DIALECTS[settings.type],
            settings.urls,
            write,
            Path(settings.shared) if settings.shared else folder / "weights",
            self.tokenizer,
            stop_ids(actor, self.tokenizer),
            self.config.seed,
            settings.timeout,
            save_base=write_base if adapter else None,
        )
        Led(made, team).load_weights(Weights(0, Gathered(actor)))
        return made

    def _environment(self) -> tuple[Callable[[], Environment], int] | None:
        """What makes one, and how many turns the policy has."""
        table, own = self.config.environment, getattr(self.world, "environment", None)
        if table is not None:
            check_reference(table.function, "environment.function")
            make = load(table.function)
            if missing := [name for name in ("reset", "step") if not callable(getattr(make, name, None))]:
                raise RewardError(f'environment.function = "{table.function}": has no method {missing[0]}.')
            return make, table.max_turns
        return None if own is None else (own, getattr(self.world, "max_turns", 8))

    def _sampled(self, actor: Any) -> Any:
        """The model that answers are sampled with. Sampling reads all weights at every token: where the actor will be in parts,
        or learns meanwhile, it is a copy."""
        return copy.deepcopy(actor) if self.config.launch.shard or self.config.staleness else actor

    def _cast(self, folder: Path) -> Cast:
        config = self.config
        assert config.algorithm
        actor = self.starting_policy(folder)
        reference = reference_of(actor) if config.algorithm.needs_reference else None
        # Where servers write the answers, only a judge on the policy's trunk needs a model that does not learn meanwhile.
        served = isinstance(config.generator, Servers) and not self._attaches_judge(folder)
        sampled = actor if served else self._sampled(actor)
        judge = self._attached_judge(sampled, folder)
        models = self._actor_critic(actor, judge, folder) if config.algorithm.needs_critic else Separate(actor, None)
        self.spread(actor)
        meanwhile = self.team.apart() if config.staleness else self.team
        reference = None if reference is None else self.spread(reference)
        temperature, placement = config.rollout.temperature, self._placement()
        make = TrustRegionLearner if isinstance(config.algorithm.update, TrustRegion) else Learner
        learner = make(
            models,
            reference,
            config.optim,
            temperature,
            config.run.steps,
            config.seed,
            self._pretraining(config.algorithm),
            self.micro_batch_tokens,
            self.team,
            placement,
        )
        rewards = self._rewards(folder, judge, meanwhile, placement)
        if servers := self._servers(actor, folder, meanwhile):
            generator, aside = self._asked(servers, meanwhile), lambda: self._asked(servers.aside(), self.team)
        else:
            generator = self._generator(sampled, meanwhile, copied=sampled is not actor)
            aside = lambda: self._generator(sampled, self.team)  # noqa: E731
        probes, contest = self._probes(aside, rewards), self._contest(aside, rewards)
        cast = Cast(learner, generator, rewards, probes, self._watched_texts(), contest)
        if self.fault is not None:
            FAULTS[self.fault](cast)
        return cast

    def _probes(self, generator: Callable[[], Generator], rewards: Sequence[Weighted]) -> list[Rollout]:
        """Answers to held-out prompts; the policy's training draws no random number less for them."""
        rollout, algorithm = self.config.rollout, self.config.algorithm
        assert algorithm
        prompts = list(self.prompts[1][: max(1, PROBES // rollout.samples_per_prompt)])
        made = answers(prompts, generator(), rollout, rollout.samples_per_prompt, rewards, algorithm)
        return [r for r in made if r.score is not None]

    def _contest(self, generator: Callable[[], Generator], rewards: Sequence[Weighted]) -> Contest | None:
        """None where a judge would have to be paid for it."""
        if self._asks_a_judge:
            return None
        prompts = list(self.prompts[1][:CONTEST_PROMPTS])

        def answer() -> Sequence[Rollout]:
            return rewarded(generator().generate(prompts, self.config.rollout), rewards)

        return Contest(answer, answer(), self.rewards.gold)

    @property
    def _asks_a_judge(self) -> bool:
        return any(isinstance(source, JudgeSource) for source in self.sources)

    def _watched_texts(self) -> Sequence[Demonstration]:
        """Of those that SFT did not see."""
        if "sft" not in self.config.recipe:
            return []
        return self.encoder.demonstrations(self.rows.read("demonstrations", self.config.sft.data)[1])[:WATCHED_TEXTS]

    def _attached_judge(self, actor: Any, folder: Path) -> AdaptedScalar | None:
        """The run's own reward model as an adapter on the actor's trunk, where it was trained as one on the same."""
        return attach(actor, REWARD, folder / "reward_model" / "adapter") if self._attaches_judge(folder) else None

    def _attaches_judge(self, folder: Path) -> bool:
        wanted = any(isinstance(s, ModelSource) and s.model is None for s in self.sources)
        return self.config.policy.adapter is not None and wanted and (folder / "reward_model" / "adapter").is_dir()

    def _pretraining(self, algorithm: Algorithm) -> Sampler[Demonstration] | None:
        """What PTX reads: texts of their own, or the run's demonstrations."""
        if algorithm.ptx.coef == 0:
            return None
        texts, _ = self.rows.read("demonstrations", self.config.data.pretraining or self.config.sft.data)
        return Sampler(self.encoder.demonstrations(texts), algorithm.ptx.batch_size, self.config.seed)

    def _actor_critic(self, actor: Any, judge: AdaptedScalar | None, folder: Path) -> ActorCritic:
        match self.config.critic:
            case SharedCritic():
                return Shared(actor, ValueHead(actor.config.get_text_config().hidden_size).to(self.device))
            case SeparateCritic():
                if judge is not None and self.critic_init is None:
                    return Separate(actor, self._spread_scalar(self._critic_like(judge, actor)))
                if self.critic_init == "policy":
                    return Separate(actor, self._spread_scalar(self._new_scalar(actor, CRITIC)))
                critic = ScalarModel.load(self.critic_init or folder / "reward_model", self.device)
                self._set_up(critic.model)
                return Separate(actor, self._spread_scalar(critic))

    def _critic_like(self, judge: AdaptedScalar, actor: Any) -> ScalarModel:
        """A critic on the same trunk that begins as the reward model."""
        critic = self._new_scalar(actor, CRITIC)
        copy_adapter(judge.under.model, REWARD, actor, CRITIC)
        critic.head.load_state_dict(judge.head.state_dict())
        critic.centre = judge.centre
        return critic

    def _critic_init(self) -> str | None:
        """What a separate critic starts from: "policy", a folder, or None for the reward model that this run trains."""
        config, source = self.config, next((s for s in self.sources if isinstance(s, ModelSource)), None)
        if not isinstance(config.critic, SeparateCritic) or not (config.algorithm and config.algorithm.needs_critic):
            return "policy"
        init = config.critic.init
        if init not in {None, "reward_model"}:
            return init if init == "policy" else existing("critic.init", init)
        on_its_trunk = config.policy.adapter is not None and init is None
        if source is None or (source.model is not None and on_its_trunk):
            return "policy"
        if source.model is None or self.rewards.reads_ids(source.model, source.label):
            return source.model
        if init == "reward_model":
            raise ModelError(
                f'critic.init = "reward_model": {source.model} does not read the policy\'s tokens, so it cannot value them. '
                'Use "policy".'
            )
        return "policy"

    def _placement(self) -> Placement:
        return Offloading(self.device) if self.config.run.offload and self.device.type != "cpu" else STAYS

    def _rewards(
        self, folder: Path, judge: ScalarModel | None = None, team: Team = ALONE, placement: Placement = STAYS
    ) -> list[Weighted]:
        """`judge`: the run's own reward model, where it is loaded already. `team`: the ranks that ask for them together."""
        trained = judge or folder / "reward_model"
        rewards = [
            Weighted(self._for_all(self.rewards.make(source, trained, folder), team, placement), source.weight)
            for source in self.sources
        ]
        if self.rewards.gold is not None and "gold" not in {source.called for source in self.sources}:
            rewards.append(Weighted(TextReward("gold", self.rewards.gold), weight=0.0))  # seen, not trained on
        return rewards

    def _for_all(self, reward: Reward, team: Team, placement: Placement) -> Reward:
        """The reward as a team asks for it; a reward model is read by all, each its share, and may be in parts."""
        if isinstance(reward, ModelReward) and team is not ALONE:
            reward.team = team
            if not isinstance(reward.model, AdaptedScalar):  # else its trunk is the sampler's
                self._spread_scalar(reward.model, team)
        for one in reward.members if isinstance(reward, EnsembleReward) else [reward]:
            if isinstance(one, ModelReward | TextModelReward | StepReward) and not isinstance(one.model, AdaptedScalar):
                one.placement = placement
                placement.rests(one.model)
        return shared(reward, team)

    def _check_models(self) -> None:
        """What can be known of the models before they are loaded."""
        policy = self.config.policy
        kind = policy.create.type if policy.create else read_config(str(self.policy_model)).get_text_config().model_type
        if policy.compile and kind not in FAMILY:
            raise ModelError(f"policy.compile = true: is there for {', '.join(sorted(FAMILY))}, not for {kind}. Use false.")
        if self.policy_model is not None:
            size = read_config(self.policy_model).get_text_config().vocab_size
            if len(self.tokenizer) > size:
                raise ModelError(
                    f"policy.tokenizer has {len(self.tokenizer):,} tokens, but {self.config.policy.model} knows only {size:,}. "
                    "Use the model's own tokenizer."
                )

    # --- data ----------------------------------------------------------------------------------------------------------

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

    def _longest_sequence(self) -> int:
        """How many tokens the policy reads at most; architectures without such a limit read any number."""
        policy = self.config.policy
        if policy.create is not None:
            return policy.create.max_length
        return getattr(read_config(str(self.policy_model)).get_text_config(), "max_position_embeddings", None) or 10**9

    @cached_property
    def prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """To train on, and held out; each with what the rewards compare answers with."""
        train, held_out = self.rows.read("prompts")
        prompts = self.encoder.prompts(train), self.encoder.prompts(held_out)
        plain = next((p for p in prompts[0] if p.messages is None), None)
        if self.environment is not None and plain is not None:
            raise DataError(f"{plain.id}: is plain text, and an environment speaks in conversations. Give the rows messages.")
        if self.config.reads("reward"):
            self.rewards.check_prompts(chain(*prompts), self.sources)
        return prompts

    def _ceiling(self, comparisons: Sequence[Example]) -> float | None:
        """How often a judge who knows the gold reward agrees with these labels."""
        if self.world is None or self.config.reward_model.data is not None:
            return None
        right = [
            self.world.gold(str(c.prompt), str(c.chosen)) > self.world.gold(str(c.prompt), str(c.rejected)) for c in comparisons
        ]
        return sum(right) / len(right)

    def notes(self) -> list[str]:
        notes = list(self.rewards.notes)
        if self.encoder.dropped:
            count = len(self.encoder.dropped)
            notes.append(f"{count:,} rows cannot be used and were left out, the first: {first_of(self.encoder.dropped)}")
        if self.config.rl_stage and self.config.rollout.filters:
            notes.append(
                "rollout.top_k and rollout.top_p sample another distribution than is trained: ratios do not start at 1, "
                "and KL estimates can be negative."
            )
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            notes.append("the tokenizer pads with its end-of-sequence token; masks come from lengths, so nothing is lost.")
        return notes


def stage_optimizer(model: Any, settings: Sft | RewardModel | Preference) -> Optimizer:
    return Optimizer([p for p in model.parameters() if p.requires_grad], settings, settings.steps)


def device(name: str, team: Team = ALONE) -> torch.device:
    """What the config's name means for this rank: of several GPUs each rank has one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{team.rank % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f'run.device = "{name}": cannot be used here ({str(error).splitlines()[0]}).') from error


def with_existing_models(source: Source) -> Source:
    """The source, its folders absolute."""
    match source:
        case ModelSource(model=model):
            return dataclasses.replace(source, model=existing("reward.model", model))
        case StepsSource(model=model):
            return dataclasses.replace(source, model=str(existing("reward.model", model)))
        case EnsembleSource(models=models):
            return dataclasses.replace(source, models=tuple(str(existing("reward.models", model)) for model in models))
    return source


def existing(key: str, model: str | None) -> str | None:
    """A model's folder as an absolute path, so that it stays the same folder when `runs/latest` moves on; a hub id, which is
    `name` or `owner/name`, as it is."""
    if model is None or Path(model).is_dir():
        return None if model is None else str(Path(model).resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f'{key} = "{model}": no such folder.')
    return model
