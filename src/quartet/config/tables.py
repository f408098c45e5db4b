"""The tables of a run's file, and `Config`, which puts them together.

The hyper-parameters of formulas, sampling and optimizers are declared in the modules that read
them; this file has the rest. A `Config` is checked when it is made: types and ranges by the
declarations, combinations of settings by `quartet.config.rules`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import model_validator

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.ilql import Ilql
from quartet.algorithms.preference import (
    Dpo,
    LastTokenLoss,
    PreferenceLoss,
    RewardModelLoss,
)
from quartet.config.data import Data
from quartet.config.label import LabelConfig
from quartet.config.read_by import PRETRAINING, REWARDED, roles_that_read
from quartet.config.reference import Reference
from quartet.config.run import Launch, RunConfig
from quartet.generation.sampling import Sampling
from quartet.generation.source import GeneratorSource, Native, Servers
from quartet.loops.source import StageSource
from quartet.models.lora import Lora
from quartet.models.shape import Shape
from quartet.parts import Field, part
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import ModelSource, is_trained_here
from quartet.runs.rounds import in_round, round_of
from quartet.stages.kinds import (
    CUSTOM,
    ILQL,
    PREFERENCE,
    REWARD_MODEL,
    RL,
    kind_of,
    stage_of,
)
from quartet.stages.rounds import rounds_of
from quartet.training.optim import Optim, OptimizerConfig


@part
class TrainTokenizer:
    """A byte-level BPE tokenizer that is trained on the run's own data."""

    type: Literal["train"] = "train"
    vocab_size: int = Field(
        default=4096,
        ge=300,
        description="The number of tokens: 256 bytes, the special tokens, and merges.",
    )


@part
class Policy:
    """The file's [policy] table: the model to align, loaded from a folder or the hub, or created
    from a shape."""

    model: str | None = Field(
        default=None, description="The folder or hub id of the model to start from."
    )
    create: Shape | None = Field(
        default=None, description="The shape of a new model, whose weights are random."
    )
    tokenizer: TrainTokenizer | str | None = Field(
        default=None,
        description='A folder or hub id, or { type = "train" }. Left out, it is the model\'s.',
    )
    chat_template: str | None = Field(
        default=None,
        description='"chatml", or a file with a template. Left out, it is the tokenizer\'s.',
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as enable_thinking = false. A row's own "
        "are in its column chat_template_kwargs.",
    )
    resize_embeddings: bool = Field(
        default=False,
        description="Add embeddings, the mean of the model's, for tokens that only the tokenizer "
        "has.",
    )
    adapter: Lora | None = Field(
        default=None,
        description='{ type = "lora" } trains an adapter. Left out, all weights are trained.',
    )
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description='"nf4" holds the linear layers under an adapter in 4 bits (QLoRA). Left out, '
        "they are in run.precision.",
    )
    frozen_layers: int = Field(
        default=0,
        ge=0,
        description="How many of the first layers are frozen, with the embeddings. Reference and "
        "critic share frozen layers with the actor.",
    )
    router_aux_loss_coef: float = Field(
        default=0.0,
        ge=0,
        description="What multiplies the load-balancing loss of a mixture of experts, wherever it "
        "is trained: as policy, reward model or critic. Typical: 0.001 to 0.01.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Keep only the input of each block for the backward pass, and compute the rest "
        "again: a third more work for a fraction of the memory.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the blocks of a Llama with torch.compile: a slower start, quicker "
        "steps. A resumed run then agrees to rounding, not to the bit.",
    )


DEFAULT_STEPS = 200
"""The optimizer steps of a stage before RL whose length is not said."""


@part
class StageTraining(OptimizerConfig):
    """What the stages that train on rows have in common: their length in steps or in epochs."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="How many optimizer steps the stage takes. Left out, epochs says it, or they "
        f"are {DEFAULT_STEPS}.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="How often the stage goes over its rows, in place of steps; 0.5 is over half "
        "of them.",
    )
    batch_size: int = Field(default=32, ge=1, description="Rows in each optimizer step.")
    data: str | None = Field(
        default=None, description="A file of the stage's rows. Left out, it is data.train."
    )

    eval_every: int = Field(
        default=0,
        ge=0,
        description="Steps between evaluations on the held-out rows; the last step is evaluated, "
        "too. 0 evaluates the end of the stage only.",
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description='The weights that the stage hands on: "last", or those of the "best" '
        "evaluation by held-out accuracy, then loss.",
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="Evaluations without improvement after which the stage ends; 0 never ends it.",
    )

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)

    def num_steps(self, rows: int) -> int:
        """Return the optimizer steps of the stage, if it has so many rows to train on: `steps`, or
        the smallest whole number that is not below `epochs` × rows / `batch_size`.

        3 epochs of 700 rows in batches of 16 are 132 steps; the last one begins a fourth epoch.
        """
        if self.epochs is None:
            assert self.steps is not None, "one of the two is set"
            return self.steps
        # 0.07 × 100 is 7.000000000000001 in floating point, and 7 rows are meant.
        return max(1, math.ceil(self.epochs * rows / self.batch_size - 1e-9))


@part
class Sft(StageTraining):
    """The file's [sft] table: supervised fine-tuning."""

    batch_size: int = Field(default=32, ge=1, description="Demonstrations in each optimizer step.")
    data: str | None = Field(
        default=None, description="A file of demonstrations. Left out, it is data.train."
    )


@part
class RewardModel(StageTraining):
    """The file's [reward_model] table: training a reward model from comparisons."""

    batch_size: int = Field(default=32, ge=1, description="Comparisons in each optimizer step.")
    data: str | None = Field(
        default=None, description="A file of comparisons. Left out, it is data.train."
    )
    model: str | None = Field(
        default=None,
        description="The folder or hub id of the model to start from, such as an encoder or a "
        "larger decoder, which reads text by its own tokenizer. Left out, it is the policy's.",
    )
    members: int = Field(
        default=1,
        ge=1,
        le=32,
        description="How many reward models are trained, one after another, as an ensemble. They "
        "differ in the seed of their new weights and of the order of the data.",
    )
    loss: RewardModelLoss = LastTokenLoss()


@part
class Preference(StageTraining):
    """The file's [preference] table: learning from comparisons directly (dpo, ipo, kto, …)."""

    batch_size: int = Field(
        default=32,
        ge=1,
        description="Comparisons in each optimizer step; of online DPO, prompts.",
    )
    data: str | None = Field(
        default=None, description="A file of comparisons. Left out, it is data.train."
    )
    loss: PreferenceLoss = Dpo()


@part
class IlqlConfig(StageTraining):
    """The file's [ilql] table: offline Q-learning on text with scores."""

    data: str | None = Field(
        default=None,
        description="A file of rows with a prompt, a completion and a score, or a label. Left out, "
        "it is data.train.",
    )
    beta: float = Field(
        default=4.0,
        ge=0,
        description="The policy that the stage leaves is π_β exp(beta · Q), normalized: 0 imitates "
        "the data, and more takes the tokens of higher Q. Typical: 1 to 16, for scores from 0 to "
        "1.",
    )
    loss: Ilql = Ilql()


@part
class SeparateCritic:
    """A critic that is a whole model, apart from the actor."""

    type: Literal["separate"] = "separate"
    init: str | None = Field(
        default=None,
        description='The weights that the critic starts from: "reward_model", "policy", or a '
        "folder. Left out, they are the reward model's where there is one that reads the policy's "
        "tokens, else the policy's, under a head of zeros: all values are 0 at first.",
    )
    create: Shape | None = Field(
        default=None,
        description="The shape of a new critic with random weights, such as one smaller than the "
        "actor. It reads the policy's tokens.",
    )


@part
class SharedCritic:
    """A critic that is a scalar head on the actor's hidden states."""

    type: Literal["shared"] = "shared"


@part
class EnvironmentConfig:
    """The file's [environment] table: what answers the policy between the turns of an episode."""

    function: str = Field(
        description="A class with reset and step, as file.py:Name or package.module.Name."
    )
    max_turns: int = Field(default=8, ge=1, description="Turns of the policy in one episode.")


@part
class RolloutConfig(Sampling):
    """The file's [rollout] table: what is sampled in one RL step."""

    prompts_per_step: int = Field(
        default=64,
        ge=1,
        description="Prompts in each RL step. Micro-batches are cut by optim.micro_batch_tokens.",
    )
    samples_per_prompt: int = Field(
        default=1, ge=1, description="Responses to each prompt; group advantages need 2 or more."
    )
    staleness: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="How many updates behind the learner the sampling weights may be; 0 samples "
        "and learns in turn. Left out, it is 1 with servers that do not sleep and 0 otherwise.",
    )


@part
class Evaluation:
    """The file's [evaluation] table: the policy against the model it started from, on held-out
    prompts."""

    policy: str | None = Field(
        default=None,
        description="The policy to evaluate, a folder or hub id, where the run trains none. It is "
        "compared with policy.model.",
    )
    prompts: int = Field(default=500, ge=2, description="How many held-out prompts are answered.")
    best_of: int = Field(
        default=16,
        ge=0,
        description="The largest n of the best-of-n curve of the first model; 0 draws no curve.",
    )


@part
class Config:
    """All settings of a run."""

    recipe: tuple[str, ...] = Field(
        description='The stages of the run in order, such as ["sft", "reward_model", "ppo"]. Of '
        "label, reward_model and an RL stage there may be several rounds."
    )
    algorithm: Algorithm | None = None
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="Seeds all that is random; a run with the same seed gives the same numbers.",
    )
    data: Data = Data()
    policy: Policy = Policy()
    sft: Sft = Sft()
    label: LabelConfig = LabelConfig()
    reward_model: RewardModel = RewardModel()
    preference: Preference = Preference()
    ilql: IlqlConfig = IlqlConfig()
    custom: StageSource | None = Field(
        default=None, description="The stage `custom`, by the type of its class: file.py:Name."
    )
    reference: Reference = Reference()
    critic: Annotated[SeparateCritic | SharedCritic, Field(discriminator="type")] = SeparateCritic()
    reward: tuple[RewardSource, ...] = ()
    environment: EnvironmentConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    generator: GeneratorSource = Native()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    run: RunConfig = RunConfig()
    launch: Launch = Launch()

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the run in order: those of the recipe, where the reward models of an
        ensemble are a stage each, and those of later rounds are numbered: "ppo.2"."""
        return tuple(
            in_round(name, self.recipe[: place + 1].count(stage))
            for place, stage in enumerate(self.recipe)
            for name in (self.reward_models if stage == REWARD_MODEL.name else (stage,))
        )

    @property
    def num_rounds(self) -> int:
        """How often the recipe collects labels anew, in rounds; 1 where it collects none."""
        return len(rounds_of(self.recipe))

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The names of the reward models that the run trains, which are those of their stages and
        of their folders; none where its recipe has no such stage."""
        if REWARD_MODEL.name not in self.recipe:
            return ()
        return REWARD_MODEL.members(self.reward_model.members)

    def readers(self, key: str) -> tuple[str, ...]:
        """Return the stages of the run that read a dotted key."""
        roles = roles_that_read(key)
        if roles is None:
            return self.stages
        return tuple(stage for stage in self.stages if roles & self._roles(stage))

    def reads(self, key: str) -> bool:
        """Return whether a stage of the recipe, or the run as a whole, reads a dotted key."""
        return roles_that_read(key) is None or bool(self.readers(key))

    def _roles(self, stage: str) -> frozenset[str]:
        kind = kind_of(stage)
        stage, _ = round_of(stage)
        roles = {kind.name} if kind is not None else set()
        if stage == self.rewarded_stage:
            roles.add(REWARDED)
        if stage == self.rl_stage and self.algorithm is not None and self.algorithm.ptx.coef > 0:
            roles.add(PRETRAINING)
        return frozenset(roles)

    def stage_trainings(self) -> Iterator[tuple[str, StageTraining]]:
        """Yield the table, by name, of each stage of the recipe that trains on rows."""
        for table, settings in self.optimizers():
            if isinstance(settings, StageTraining):
                yield table, settings

    def optimizers(self) -> Iterator[tuple[str, OptimizerConfig]]:
        """Yield the optimizer's table, by name, of each stage of the recipe that trains a model."""
        for stage in self.recipe:
            kind = kind_of(stage)
            if kind is None or kind.optim is None:
                continue
            if (settings := getattr(self, kind.optim)) is not None:
                yield kind.optim, settings

    @property
    def staleness(self) -> int:
        """How many updates behind the learner the sampling weights may be."""
        if self.rollout.staleness == "auto":
            return int(isinstance(self.generator, Servers) and not self.generator.sleeps)
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
    def stage_source(self) -> StageSource | None:
        """What the recipe's stage `custom` does; None if it has no such stage."""
        return self.custom if CUSTOM.name in self.recipe else None

    @property
    def policy_stage(self) -> str | None:
        """The recipe's stage that trains the policy after SFT; None if there is none."""
        others = (stage_of(kind, self.recipe) for kind in (ILQL, CUSTOM))
        return self.rl_stage or self.preference_stage or next(filter(None, others), None)

    @property
    def has_online_pairs(self) -> bool:
        """Whether the preference stage learns from pairs of answers that it samples."""
        return self.preference_stage == "online_dpo"

    @property
    def rewarded_stage(self) -> str | None:
        """The recipe's stage that learns from rewards of answers it samples; None if there is
        none."""
        return self.rl_stage or (self.preference_stage if self.has_online_pairs else None)

    @property
    def has_episodes(self) -> bool:
        """Whether a response can have several turns, between which an environment answers."""
        return self.environment is not None or self.data.world == "guess"

    @property
    def reward_model_source(self) -> RewardSource | None:
        """The first reward model among the rewards, which a critic can start from; of ensembles,
        only the one that the run trains. None if there is none."""
        return next(
            (r for r in self.reward if isinstance(r, ModelSource) or is_trained_here(r)), None
        )

    @model_validator(mode="after")
    def _can_work(self) -> "Config":
        from quartet.config.rules import first_problem  # which imports this module

        if (problem := first_problem(self)) is not None:
            raise ValueError(problem)
        return self


def json_ready(config: Config) -> dict[str, Any]:
    """Return the config as plain tables, without settings that are None."""
    table: dict[str, Any] = without_none(dataclasses.asdict(config))
    return table


def without_none(value: Any) -> Any:
    """Return a tree of tables and lists without the keys whose value is None, which TOML does not
    have."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value
