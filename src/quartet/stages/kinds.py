"""The kinds of stages, as data: what a stage is called, where its settings are, what it leaves.

A stage's name is what a recipe says ("sft", "ppo", "dpo"); its kind is what it does. Everything
that must know the stages iterates over `KINDS` or asks `kind_of`; nothing compares names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS
from quartet.runs.rounds import round_of

CENTRING_PROMPTS = 256
"""How many training prompts are answered to find a reward model's mean score."""
BEST_OF_RESPONSES = 512
"""How many responses the best-of-n curve is computed from, in all."""
Summary = Mapping[str, Any]
"""What is known at the end of a stage, by name."""


@dataclass(frozen=True)
class Headline:
    """How one metric is shown in the line of a running stage."""

    label: str
    metric: str
    format: str = "{:z.2f}"
    change: bool = False
    """Show the first value as well: 0.51 → 0.87."""


@dataclass(frozen=True)
class StageKind:
    """One kind of stage."""

    name: str
    order: int
    """The place in a recipe: lower comes first, and two stages of one order exclude each other."""
    presets: Mapping[str, Any] | None = None
    """The names that stages of this kind have in a recipe, with their presets; None: its own."""
    steps: str | None = None
    """The key that says how many steps the stage has."""
    optim: str | None = None
    """The table of its optimizer and learning-rate schedule."""
    results: tuple[str, ...] = ()
    """The folders that it leaves for later stages. One that has members leaves a folder of the
    stage's name."""
    headlines: tuple[Headline, ...] = ()
    closing: Callable[[Summary], str] = lambda summary: ""  # noqa: ARG005
    """What its line says at the end, from its summary."""
    learns: bool = True
    """Whether the stage trains a model."""
    has_members: bool = False
    """Whether a stage of the recipe can be several stages of the run, which are numbered."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The names that stages of this kind have in a recipe."""
        return (self.name,) if self.presets is None else tuple(self.presets)

    def folders(self, stage: str) -> tuple[str, ...]:
        """Return the folders that the stage of this name leaves for later stages, in the folder of
        its round."""
        return (round_of(stage)[0],) if self.has_members else self.results

    def members(self, count: int) -> tuple[str, ...]:
        """Return the names of the stages that train `count` models of an ensemble; a single one has
        the name of the kind."""
        if count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(1, count + 1))


def _sft_closing(summary: Summary) -> str:
    before = summary.get("held_out_loss_before")
    since = "" if before is None else f"{before:.2f} → "
    return f"(held out {since}{summary['held_out_loss']:.2f}{_chosen(summary)})"


def _reward_model_closing(summary: Summary) -> str:
    ceiling = f" of {summary['ceiling']:.2f} possible" if "ceiling" in summary else ""
    return f"(held out {summary['held_out_accuracy']:.2f}{ceiling}{_chosen(summary)})"


def _preference_closing(summary: Summary) -> str:
    accuracy = summary.get("held_out_accuracy")
    return "" if accuracy is None else f"(held out {accuracy:.2f}{_chosen(summary)})"


def _chosen(summary: Summary) -> str:
    """Return which step a stage hands on, and where it ended early, for the end of a phrase."""
    best, stopped = summary.get("best_step"), summary.get("stopped_at")
    chosen = "" if best is None else f", best at step {best:,}"
    return chosen + ("" if stopped is None else f", stopped at {stopped:,}")


def _evaluation_closing(summary: Summary) -> str:
    win, kl, judge = summary["win_rate"], summary["kl"], summary["judge"]
    gain = summary["after"].get(judge, 0.0) - summary["before"].get(judge, 0.0)
    rate = f"win rate by {judge} {win['mean']:.2f} ± {win['interval']:.2f}"
    return f"{rate} · {judge} {gain:+z.2f} at KL {kl['mean']:z.1f}".replace("-", "−")


LOSS = Headline("loss", "loss", change=True)
PAIR_ACCURACY = Headline("pair accuracy", "accuracy", change=True)
REWARDED = (
    Headline("reward", "reward", change=True),
    Headline("gold", "reward/gold", change=True),
    Headline("exact", "reward/exact", "{:z.0%}", change=True),
)

SFT = StageKind(
    name="sft",
    order=0,
    steps="sft.steps",
    optim="sft",
    results=("sft",),
    headlines=(LOSS,),
    closing=_sft_closing,
)
LABEL = StageKind(
    name="label",
    order=1,
    steps="label.labels",
    results=("comparisons",),
    closing=lambda summary: f"({summary['sentence']})",
    learns=False,
)
REWARD_MODEL = StageKind(
    name="reward_model",
    order=2,
    steps="reward_model.steps",
    optim="reward_model",
    headlines=(PAIR_ACCURACY,),
    closing=_reward_model_closing,
    has_members=True,
)
PREFERENCE = StageKind(
    name="preference",
    order=3,
    presets=PREFERENCES,
    steps="preference.steps",
    optim="preference",
    results=("policy",),
    headlines=(
        LOSS,
        PAIR_ACCURACY,
        Headline("log p chosen", "logprobs/chosen", "{:z.1f}", change=True),
    ),
    closing=_preference_closing,
)
ILQL = StageKind(
    name="ilql",
    order=3,
    steps="ilql.steps",
    optim="ilql",
    results=("policy", "q_heads"),
    headlines=(
        LOSS,
        Headline("V", "value/mean", change=True),
        Headline("Q explains", "q/explained_variance", "{:z.0%}"),
    ),
    closing=lambda summary: f"(held out {summary['held_out_loss']:.2f}{_chosen(summary)})",
)
CUSTOM = StageKind(
    name="custom",
    order=3,
    steps="custom.steps",
    optim="custom",
    results=("policy",),
    headlines=(LOSS, *REWARDED),
)
RL = StageKind(
    name="rl",
    order=3,
    presets=ALGORITHMS,
    steps="run.steps",
    optim="optim",
    results=("policy", "policy_ema", "critic"),
    headlines=(
        *REWARDED,
        Headline("KL", "kl", "{:z.1f}"),
        Headline("clip", "policy/clip_fraction", "{:z.0%}"),
        Headline("ev", "value/explained_variance"),
    ),
)
EVALUATION = StageKind(name="evaluation", order=4, closing=_evaluation_closing, learns=False)

KINDS = (SFT, LABEL, REWARD_MODEL, PREFERENCE, ILQL, CUSTOM, RL, EVALUATION)
"""All kinds, in the order in which a recipe names them."""


def kind_of(stage: str) -> StageKind | None:
    """Return the kind of the stage that a recipe calls `stage`, of a member of it, or of it in a
    later round; None if there is no such stage."""
    stage, _ = round_of(stage)
    name, _ = member_of(stage)
    return next(
        (k for k in KINDS if stage in k.stages or (k.has_members and name in k.stages)), None
    )


def member_of(stage: str) -> tuple[str, int | None]:
    """Return what a recipe calls a stage, and the stage's number where it is one of several:
    "reward_model-2" is number 2 of "reward_model"."""
    name, dash, number = stage.rpartition("-")
    return (name, int(number)) if dash and number.isdecimal() else (stage, None)


def stage_of(kind: StageKind, recipe: Iterable[str]) -> str | None:
    """Return the name of the recipe's stage of this kind, None if it has none."""
    return next((stage for stage in recipe if stage in kind.stages), None)
