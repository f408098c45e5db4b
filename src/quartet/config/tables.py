"""What a run is. Every key has a default or a reason to be asked for; what cannot work is refused,
with what to do instead.

The hyper-parameters of formulas, sampling and optimizers are declared where they are read; this
file has the rest, and puts them together.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import model_validator

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.preference import (
    Dpo,
    LastTokenLoss,
    PreferenceLoss,
    RewardModelLoss,
)
from quartet.config.read_by import PRETRAINING, REWARDED, roles_that_read
from quartet.generation.sampling import Sampling
from quartet.models.lora import Lora
from quartet.models.shape import Shape
from quartet.parts import Field, part
from quartet.recording.metric import Metric
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import ModelSource
from quartet.stages.kinds import PREFERENCE, RL, kind_of, stage_of
from quartet.training.optim import Optim, OptimizerConfig

WORLDS = Literal["reviews", "sums", "guess"]


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
class Sft(OptimizerConfig):
    """Supervised fine-tuning: the file's [sft] table."""

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=32, ge=1)
    data: str | None = Field(default=None, description="Left out, it is data.train.")


@part
class RewardModel(OptimizerConfig):
    """Training the reward model: the file's [reward_model] table."""

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=32, ge=1)
    data: str | None = Field(default=None, description="Left out, it is data.train.")
    loss: RewardModelLoss = LastTokenLoss()


@part
class Preference(OptimizerConfig):
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
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description='Metrics of your own, ["mine.py:MyMetric"]: a number of each RL step.',
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

    def readers(self, key: str) -> tuple[str, ...]:
        """Return the stages of the recipe that read a dotted key."""
        roles = roles_that_read(key)
        if roles is None:
            return self.recipe
        return tuple(stage for stage in self.recipe if roles & self._roles(stage))

    def reads(self, key: str) -> bool:
        """Return whether a stage of the recipe, or the run as a whole, reads a dotted key."""
        return roles_that_read(key) is None or bool(self.readers(key))

    def _roles(self, stage: str) -> frozenset[str]:
        kind = kind_of(stage)
        roles = {kind.name} if kind is not None else set()
        if stage == self.rewarded_stage:
            roles.add(REWARDED)
        if stage == self.rl_stage and self.algorithm is not None and self.algorithm.ptx.coef > 0:
            roles.add(PRETRAINING)
        return frozenset(roles)

    @property
    def staleness(self) -> int:
        """How many updates old the weights may be that sample."""
        if self.rollout.staleness == "auto":
            return int(isinstance(self.generator, Servers))
        return self.rollout.staleness

    @property
    def rl_stage(self) -> str | None:
        """The recipe's RL stage, named by its preset; None if there is none."""
        return stage_of(RL, self.recipe)

    @property
    def preference_stage(self) -> str | None:
        """The recipe's stage that learns from comparisons directly; None if there is none."""
        return stage_of(PREFERENCE, self.recipe)

    @property
    def rewarded_stage(self) -> str | None:
        """The recipe's stage that learns from rewards of answers it samples; None if there is
        none."""
        online = "online_dpo" if "online_dpo" in self.recipe else None
        return self.rl_stage or online

    @property
    def has_episodes(self) -> bool:
        """Whether a response can have several turns, between which an environment answers."""
        return self.environment is not None or self.data.world == "guess"

    @property
    def reward_model_source(self) -> ModelSource | None:
        """The reward model that a critic may start from: the first."""
        return next((r for r in self.reward if isinstance(r, ModelSource)), None)

    @model_validator(mode="after")
    def _can_work(self) -> "Config":
        from quartet.config.rules import first_problem  # which imports this module

        if (problem := first_problem(self)) is not None:
            raise ValueError(problem)
        return self


def json_ready(config: Config) -> dict[str, Any]:
    """The config as plain tables, without what is not set."""
    table: dict[str, Any] = without_none(dataclasses.asdict(config))
    return table


def without_none(value: Any) -> Any:
    """Tables and lists without what is not set, as TOML has them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value
