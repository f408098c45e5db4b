"""What a run is. Every key has a default or a reason to be asked for; what cannot work is refused,
with what to do instead.

The hyper-parameters of formulas, sampling and optimizers are declared where they are read; this
file has the rest, and puts them together.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.preference import (
    PREFERENCES,
    Dpo,
    LastTokenLoss,
    PreferenceLoss,
    RewardModelLoss,
)
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.update import TrustRegion
from quartet.generation.sampling import Sampling
from quartet.models.lora import Lora
from quartet.models.shape import Shape
from quartet.parts import Field, part
from quartet.rewards.sources import (
    PER_TOKEN,
    EnvironmentSource,
    GoldSource,
    JudgeSource,
    ModelSource,
    RewardSource,
)
from quartet.training.optim import Descent, Optim

WORLDS = Literal["reviews", "sums", "guess"]


def did_you_mean(value: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


@part
class Data:
    """Where prompts, demonstrations and comparisons come from: a file, or an embedded world."""

    world: WORLDS | None = None
    train: str | tuple[str, ...] | None = Field(
        default=None, description="A file or folder, or a list of them."
    )
    weights: tuple[float, ...] | None = Field(
        default=None,
        description="How often a row of each file of train is seen in an epoch: 2 is twice, 0.5 a "
        "random half.",
    )
    eval: str | None = Field(default=None, description="Left out, a share of train is held out.")
    pretraining: str | None = Field(
        default=None, description="What PTX reads. Left out, it is the SFT stage's data."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="What the columns of the files are called here."
    )
    rows: int = Field(default=4000, ge=1, description="How many rows a world makes for each stage.")
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="The share of train that is held out where there is no eval.",
    )
    max_prompt_tokens: int = Field(default=512, ge=1)
    max_response_tokens: int = Field(default=512, ge=1)
    unusable: Literal["refuse", "drop"] = "refuse"

    @property
    def files(self) -> tuple[str, ...]:
        """Of train."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()


@part
class TrainTokenizer:
    """A byte-level BPE tokenizer, trained on the run's own data."""

    type: Literal["train"] = "train"
    vocab_size: int = Field(
        default=4096,
        ge=300,
        description="256 bytes, the special tokens, and what merges make of them.",
    )


@part
class Policy:
    """The model to align: a folder or hub id, or a shape to create from scratch."""

    model: str | None = None
    create: Shape | None = None
    tokenizer: TrainTokenizer | str | None = Field(
        default=None, description="A folder, or one to train. Default: the model's."
    )
    chat_template: str | None = Field(
        default=None, description='"chatml" or a file with a template.'
    )
    adapter: Lora | None = Field(
        default=None, description='{ type = "lora" }. Left out, all weights are trained.'
    )
    frozen_layers: int = Field(
        default=0,
        ge=0,
        description="The embeddings and so many of the first layers stay as they are, and "
        "reference and critic share them.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="While training, keep only what each block was given and compute the rest "
        "again: a third more work for a "
        "fraction of the memory.",
    )
    compile: bool = Field(
        default=False,
        description="Let torch.compile write the blocks of a Llama: slower to begin, quicker "
        "after. A resumed run then agrees "
        "to rounding, not to the bit.",
    )


@part
class Sft(Descent):
    """Supervised fine-tuning: the file's [sft] table."""

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=32, ge=1)
    data: str | None = Field(default=None, description="Left out, it is data.train.")


@part
class RewardModel(Descent):
    """Training the reward model: the file's [reward_model] table."""

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=32, ge=1)
    data: str | None = Field(default=None, description="Left out, it is data.train.")
    loss: RewardModelLoss = LastTokenLoss()


@part
class Preference(Descent):
    """Learning from comparisons directly (dpo, ipo, kto, …): the file's [preference] table."""

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(
        default=32, ge=1, description="Comparisons in each optimizer step; online, prompts."
    )
    data: str | None = Field(default=None, description="Left out, it is data.train.")
    loss: PreferenceLoss = Dpo()


@part
class SeparateCritic:
    """A critic with a trunk of its own."""

    type: Literal["separate"] = "separate"
    init: str | None = Field(
        default=None,
        description='"reward_model", "policy", or a folder. Left out: the reward model where there '
        "is one.",
    )


@part
class SharedCritic:
    """A scalar head on the actor's trunk."""

    type: Literal["shared"] = "shared"


@part
class Environment:
    """Who answers the policy, where an answer has several turns: the file's [environment] table."""

    function: str = Field(
        description="file.py:Name of a class with reset and step, or package.module.Name."
    )
    max_turns: int = Field(default=8, ge=1, description="Turns of the policy in one episode.")


@part
class Rollout(Sampling):
    """What is sampled in one RL step: the file's [rollout] table."""

    prompts_per_step: int = Field(
        default=64, ge=1, description="The only batch size a person sets."
    )
    samples_per_prompt: int = Field(
        default=1, ge=1, description="Answers to each prompt; group advantages need 2 or more."
    )
    staleness: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="How many updates old the weights may be that sample, while others are being "
        "made. 0: one after the other. "
        "Left out: 1 where servers write the answers, else 0.",
    )


@part
class Native:
    """Answers are sampled here, by the very module that learns."""

    type: Literal["native"] = "native"


@part
class Servers:
    """Answers are sampled by servers, each in an environment of its own."""

    urls: tuple[str, ...] = Field(
        min_length=1, description='Where they listen, ["http://127.0.0.1:8000"].'
    )
    type: Literal["vllm", "sglang"] = "vllm"
    shared: str | None = Field(
        default=None,
        description="The folder through which they get new weights; they read it too. Left out, in "
        "the run's.",
    )
    timeout: float = Field(
        default=600.0, gt=0, description="Seconds for one answer, and for a server to come back."
    )
    adapter: bool = Field(
        default=False,
        description="They were started with --enable-lora: the policy's base goes to them once, "
        "and then its adapter alone.",
    )


@part
class Evaluation:
    """The last stage: the policy against the model it started from, on held-out prompts."""

    prompts: int = Field(default=500, ge=2)
    best_of: int = Field(
        default=16,
        ge=0,
        description="How many answers of the first model the best-of-n curve chooses from; 0: none.",
    )


KEPT_STEPS = 1000
"""A run with more keeps some of its rollouts only."""


@part
class Run:
    steps: int = Field(default=100, ge=1, description="How many RL steps.")
    folder: str = "runs"
    name: str | None = Field(
        default=None, description="Left out, it is the recipe's or the file's."
    )
    device: str = Field(default="auto", description='"auto", "cpu" or "cuda".')
    offload: bool = Field(
        default=False,
        description="On a GPU: frozen models, and the optimizers' moments, wait in main memory "
        "while others work.",
    )
    rollouts_every: int | None = Field(
        default=None,
        ge=1,
        description="Every how many RL steps the rollouts are written, and all extreme ones. Left "
        "out: all of 1,000 steps.",
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints. Left out: as often as takes under 2 % of the time.",
    )
    keep_last: int = Field(
        default=2, ge=1, description="How many checkpoints are kept, beside the best."
    )
    keep_best: str | None = Field(
        default=None,
        description='The metric by which one more checkpoint is kept, "reward/gold"; "-loss" where '
        "less is better.",
    )
    rollbacks: int = Field(
        default=0,
        ge=0,
        description="How often a stage may go back to its last checkpoint, with half the learning "
        "rate, where a loss, gradient "
        "or log-probability is not finite. 0: it stops.",
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="The run saves and stops after so long, to be resumed: for machines on loan.",
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=(), description="Where else the metrics go; each needs the extra of its name."
    )

    @property
    def keep_every(self) -> int:
        """The same, resolved."""
        return self.rollouts_every or math.ceil(self.steps / KEPT_STEPS)


@part
class Launch:
    """How many processes train, and who starts them: the file's [launch] table."""

    type: Literal["local", "torchrun", "ray"] = Field(
        default="local",
        description="Processes of this machine; those that torchrun or srun has started; or Ray's "
        "actors.",
    )
    processes: int = Field(
        default=1, ge=1, description="Ranks. Under torchrun its own number counts."
    )
    shard: bool | Annotated[int, Field(ge=2)] = Field(
        default=False,
        description="Each rank holds a part of every matrix (FSDP2) instead of all weights. A "
        "number: of so many ranks one "
        "model each (HSDP).",
    )
    deadline: float = Field(
        default=600.0,
        gt=0,
        description="Seconds after which a rank that others wait for counts as lost.",
    )
    restarts: int = Field(
        default=0, ge=0, description="How often the run goes on by itself after a rank was lost."
    )
    address: str | None = Field(
        default=None, description="Of a Ray cluster. Left out, one is started on this machine."
    )

    def parts(self, world: int) -> int:
        """Over how many of so many ranks a model is in parts."""
        return world if isinstance(self.shard, bool) else self.shard


@part
class Config:
    """A run, complete and checked."""

    recipe: tuple[str, ...]
    algorithm: Algorithm | None = None
    seed: int = Field(default=0, ge=0)
    data: Data = Data()
    policy: Policy = Policy()
    sft: Sft = Sft()
    reward_model: RewardModel = RewardModel()
    preference: Preference = Preference()
    critic: Annotated[SeparateCritic | SharedCritic, Field(discriminator="type")] = SeparateCritic()
    reward: tuple[RewardSource, ...] = ()
    environment: Environment | None = None
    rollout: Rollout = Rollout()
    generator: Annotated[Native | Servers, Field(discriminator="type")] = Native()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()
    launch: Launch = Launch()

    def reads(self, key: str) -> bool:
        """Whether a stage of the recipe looks at this key."""
        aligns_by_rewards = self.rl_stage is not None or self.preference_stage == "online_dpo"
        match key.partition(".")[0]:
            case "sft":
                mixed_in = self.algorithm is not None and self.algorithm.ptx.coef > 0
                return "sft" in self.recipe or (key == "sft.data" and mixed_in)
            case "reward_model":
                return "reward_model" in self.recipe
            case "preference":
                return self.preference_stage is not None
            case "critic":
                return self.rl_stage is not None
            case "optim":
                return self.rl_stage is not None or key == "optim.micro_batch_tokens"
            case "generator":
                return self.rl_stage is not None
            case "reward" | "environment":
                return aligns_by_rewards or "evaluation" in self.recipe
            case "rollout":
                return (
                    aligns_by_rewards
                    or "evaluation" in self.recipe
                    or "reward_model" in self.recipe
                )
            case "run":
                return self.rl_stage is not None or key not in {
                    "run.steps",
                    "run.rollouts_every",
                    "run.offload",
                }
        return True

    @property
    def staleness(self) -> int:
        """How many updates old the weights may be that sample."""
        if self.rollout.staleness == "auto":
            return int(isinstance(self.generator, Servers))
        return self.rollout.staleness

    @property
    def rl_stage(self) -> str | None:
        """The preset that the recipe names, if it has an RL stage."""
        return next((stage for stage in self.recipe if stage in ALGORITHMS), None)

    @property
    def preference_stage(self) -> str | None:
        """The stage that learns from comparisons directly, if the recipe has one."""
        return next((stage for stage in self.recipe if stage in PREFERENCES), None)

    @property
    def reward_model_source(self) -> ModelSource | None:
        """The reward model that a critic may start from: the first."""
        return next((r for r in self.reward if isinstance(r, ModelSource)), None)

    @model_validator(mode="after")
    def _can_work(self) -> "Config":
        for problem in (
            *self._recipe_problems(),
            *self._source_problems(),
            *self._reward_problems(),
            *self._rl_problems(),
            *self._launch_problems(),
        ):
            raise ValueError(problem)
        return self

    def _recipe_problems(self) -> list[str]:
        order = {
            "sft": 0,
            "reward_model": 1,
            **dict.fromkeys((*ALGORITHMS, *PREFERENCES), 2),
            "evaluation": 3,
        }
        known = "sft, reward_model, evaluation, and what `quartet algorithms` lists"
        if not self.recipe:
            return [f"recipe: is empty. Name one stage or more of {known}."]
        problems = [
            f'recipe: "{stage}" is no stage.{did_you_mean(stage, order)} Known are {known}.'
            for stage in self.recipe
            if stage not in order
        ]
        if problems:
            return problems
        ranks = [order[stage] for stage in self.recipe]
        if ranks != sorted(set(ranks)):
            problems.append(
                "recipe: stages go from sft over reward_model and one RL or preference stage to "
                "evaluation, each at most once; "
                f"this one says {', '.join(self.recipe)}."
            )
        named = (
            PREFERENCES[self.preference_stage].type
            if self.preference_stage
            else self.preference.loss.type
        )
        if self.preference.loss.type != named:
            problems.append(
                f'preference.loss.type = "{self.preference.loss.type}", but the recipe says '
                f'"{self.preference_stage}". '
                "Make them the same."
            )
        aligns = self.rl_stage or self.preference_stage
        if self.preference_stage == "kto" and self.preference.batch_size < 2:
            problems.append(
                "preference.batch_size = 1: KTO estimates the KL from answers under other prompts "
                "of the batch, so it must be "
                "≥ 2."
            )
        if "evaluation" in self.recipe and aligns is None:
            problems.append(
                "recipe: evaluation compares an RL or preference stage's policy with the one "
                "before it; there is none."
            )
        if "evaluation" in self.recipe and not self.reward and self.data.world is None:
            problems.append(
                "recipe: evaluation needs a [[reward]] or a world to say which answers are better."
            )
        return problems

    def _source_problems(self) -> list[str]:
        problems = []
        named = {
            "data.train": self.data.files or (None,),
            "data.eval": (self.data.eval,),
            "policy.model": (self.policy.model,),
        }
        if self.data.train is not None and not self.data.files:
            problems.append("data.train: is empty. Name a file.")
        problems += [
            f"{key}: is empty. Name a file or folder."
            for key, paths in named.items()
            if "" in paths
        ]
        name = self.run.name
        if name is not None and (
            not name.strip()
            or Path(name).name != name
            or name.startswith(".")
            or not name.isprintable()
        ):
            problems.append(
                f"run.name = {name!r}: is a name, not a path; letters, digits and dashes."
            )
        if (self.policy.model is None) == (self.policy.create is None):
            problems.append(
                "policy.model: name a folder or hub id, or describe a new model in policy.create; "
                "exactly one of the two."
            )
        if (self.data.world is None) == (self.data.train is None):
            problems.append(
                "data.train: name a file, or an embedded world in data.world; exactly one of the "
                "two."
            )
        if self.policy.adapter is not None and self.policy.frozen_layers:
            problems.append(
                "policy.frozen_layers: an adapter freezes all layers already. Take one of the two "
                "out."
            )
        shape = self.policy.create
        if shape is not None and self.policy.frozen_layers >= shape.num_layers:
            problems.append(
                f"policy.frozen_layers = {self.policy.frozen_layers}: the model has "
                f"{shape.num_layers} layers."
            )
        weights = self.data.weights
        if weights is not None and (
            len(weights) != len(self.data.files)
            or not all(w >= 0 for w in weights)
            or not sum(weights)
        ):
            problems.append(
                f"data.weights = {list(weights)}: needs one number ≥ 0 for each of "
                f"{len(self.data.files)} files in data.train."
            )
        if (
            self.policy.create is not None
            and self.policy.tokenizer is None
            and self.data.world is None
        ):
            problems.append(
                'policy.tokenizer: a new model needs one. Write tokenizer = { type = "train" } or '
                "name a folder."
            )
        if self.data.world in {"sums", "guess"} and "reward_model" in self.recipe:
            problems.append(
                f"recipe: the world {self.data.world} has no comparisons to train a reward model "
                f"on, its answers are checked."
            )
        return problems

    def _reward_problems(self) -> list[str]:
        """What any stage that asks for rewards needs."""
        problems = []
        asking = self.rl_stage or ("online_dpo" if self.preference_stage == "online_dpo" else None)
        if asking and not self.reward:
            problems.append(
                f'reward: {asking} needs one. Add [[reward]] with type = "model" and model = a '
                f'folder, or type = "exact".'
            )
        unnamed = any(isinstance(r, ModelSource) and r.model is None for r in self.reward)
        if self.reads("reward") and unnamed and "reward_model" not in self.recipe:
            problems.append(
                "reward.model: name the reward model's folder, or put reward_model before "
                f"{asking or 'the others'} in the recipe."
            )
        names = [r.called for r in self.reward]
        if twice := [name for name in names if names.count(name) > 1]:
            problems.append(
                f"reward.name: two rewards are called {twice[0]}. Give each a name of its own, "
                f'name = "…".'
            )
        if asking and self.reward and all(r.weight == 0 for r in self.reward):
            problems.append(
                "reward.weight: is 0 for every reward, so there is nothing to learn from."
            )
        pairwise = any(
            isinstance(r, JudgeSource) and r.mode == "pairwise" and r.weight for r in self.reward
        )
        if pairwise and self.rl_stage and self.rollout.samples_per_prompt < 2:
            problems.append(
                'reward.mode = "pairwise": compares answers to the same prompt, so '
                "rollout.samples_per_prompt must be ≥ 2."
            )
        if self.data.world is None and any(isinstance(r, GoldSource) for r in self.reward):
            problems.append('reward.type: "gold" is known in an embedded world only.')
        if self.data.world in {"sums", "guess"} and self.preference_stage and asking is None:
            problems.append(
                f"recipe: the world {self.data.world} has no comparisons to learn from; its "
                f"answers are checked."
            )
        episodes = self.environment is not None or self.data.world == "guess"
        if not episodes and any(isinstance(r, EnvironmentSource) for r in self.reward):
            problems.append(
                'reward.type: "environment" needs an environment. Add [environment] with function '
                '= "file.py:Name".'
            )
        if self.algorithm is not None and self.algorithm.needs_greedy and episodes:
            problems.append(
                "environment: an algorithm that compares with a greedy answer is not written for "
                "several turns."
            )
        return problems

    def _rl_problems(self) -> list[str]:
        if self.rl_stage is None or self.algorithm is None:
            return []
        problems = []
        if self.algorithm.needs_group and self.rollout.samples_per_prompt < 2:
            problems.append(
                f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}: {self.rl_stage} "
                f"compares several answers "
                "to one prompt, so it must be ≥ 2. Typical: 8."
            )
        if (
            isinstance(self.critic, SeparateCritic)
            and self.critic.init == "reward_model"
            and not self.reward_model_source
        ):
            problems.append(
                'critic.init = "reward_model": there is no reward model here. Use "policy" or a '
                "folder."
            )
        problems += self._algorithm_problems(self.algorithm)
        problems += self._server_problems(self.generator)
        if self.optim.critic_warmup_steps and not self.algorithm.needs_critic:
            problems.append(
                f"optim.critic_warmup_steps = {self.optim.critic_warmup_steps}: {self.rl_stage} "
                f"has no critic."
            )
        rows = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.optim.minibatches > rows:
            problems.append(
                f"optim.minibatches = {self.optim.minibatches}: a step has only {rows} responses."
            )
        shape = self.policy.create
        if shape and self.data.max_prompt_tokens + self.rollout.max_new_tokens > shape.max_length:
            problems.append(
                f"policy.create.max_length = {shape.max_length}: too short for "
                f"data.max_prompt_tokens = "
                f"{self.data.max_prompt_tokens} and rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens} together."
            )
        return problems

    def _server_problems(self, generator: Native | Servers) -> list[str]:
        problems = []
        if isinstance(generator, Servers) and generator.adapter and self.policy.adapter is None:
            problems.append(
                "generator.adapter = true: the policy is none. Set policy.adapter, or take it out."
            )
        if isinstance(generator, Servers) and generator.type == "sglang" and self.rollout.filters:
            problems.append(
                'generator.type = "sglang": tells log-probs of the distribution before '
                "rollout.top_k and rollout.top_p, "
                "from which nothing was drawn. Leave those at 0 and 1."
            )
        return problems

    def _launch_problems(self) -> list[str]:
        launch, problems = self.launch, []
        if launch.address is not None and launch.type != "ray":
            problems.append(
                f'launch.address: is a Ray cluster\'s, and launch.type = "{launch.type}". Use type '
                f'= "ray".'
            )
        if launch.restarts and launch.type == "torchrun":
            problems.append(
                "launch.restarts: torchrun starts its ranks again itself, with --max-restarts; "
                "run.name and --resume make the "
                "same words go on."
            )
        by_hand = launch.type != "torchrun" and not isinstance(launch.shard, bool)
        if by_hand and launch.processes % launch.parts(launch.processes):
            problems.append(
                f"launch.shard = {launch.shard}: launch.processes = {launch.processes} is no "
                f"multiple of it, so some rank "
                "would have no part."
            )
        trusts = self.algorithm is not None and isinstance(self.algorithm.update, TrustRegion)
        if self.policy.compile and trusts:
            problems.append(
                'policy.compile: algorithm.update.type = "trust_region" takes second derivatives, '
                "and what torch.compile "
                "writes has none. Use false."
            )
        if launch.shard and trusts:
            problems.append(
                'launch.shard: second derivatives, for algorithm.update.type = "trust_region", '
                "need all weights on every rank. "
                "Use false."
            )
        return problems

    def _algorithm_problems(self, algorithm: Algorithm) -> list[str]:
        """What the algorithm asks of the rest of the run."""
        problems = []
        if algorithm.needs_token_scores and (
            whole := [r for r in self.reward if r.weight and not isinstance(r, PER_TOKEN)]
        ):
            problems.append(
                f'algorithm.rewards.type = "{algorithm.rewards.type}": reads a score for each '
                f"token, and the reward "
                f'{whole[0].called} gives one per response. Use "last_token", or a reward of type '
                f'"model", "steps", "function".'
            )
        if isinstance(algorithm.update, TrustRegion) and not algorithm.needs_critic:
            problems.append(
                f'algorithm.update.type = "trust_region": is written for algorithms with a critic, '
                f"and advantage.type = "
                f'"{algorithm.advantage.type}" has none. Use advantage = {{ type = "gae" }}.'
            )
        if isinstance(algorithm.update, TrustRegion) and algorithm.ptx.coef > 0:
            problems.append(
                'algorithm.ptx: is not mixed into update.type = "trust_region". Use "first_order".'
            )
        return problems


def json_ready(config: Config) -> dict[str, Any]:
    """The config as plain tables, without what is not set."""
    table: dict[str, Any] = without_none(dataclasses.asdict(config))
    return table


def without_none(value: Any) -> Any:
    """Tables and lists without what is not set, as TOML has them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value
