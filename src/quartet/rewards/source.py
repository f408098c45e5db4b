"""What a `[[reward]]` table becomes: a source, which makes the reward when the run is assembled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from quartet.experience import Rollout
from quartet.models.protocols import Tokenizer
from quartet.parts import Family, Field
from quartet.rewards.protocol import Reward, RewardError, Score

WEIGHT = "What it counts for in the score, which is the weighted sum. 0: watched only."
NAME = "What metrics and rollouts call it. Left out: the type, or the function's or class's name."


@dataclass(frozen=True)
class RewardContext:
    """What a source may need of its run to make a reward."""

    tokenizer: Tokenizer
    """The policy's."""
    token_texts: Callable[[Sequence[int]], list[str]] | None
    """Returns the text of each of some token ids; None where responses are from policies with
    different tokenizers."""
    micro_batch_tokens: int
    """Tokens of one forward pass."""
    device: Any
    """The `torch.device` of the run's models."""
    dtype: Any = None
    """The `torch.dtype` that reward models compute in; None is float32."""
    gold: Callable[[str, str], float] | None = None
    """The gold reward of a prompt and a response, in an embedded world."""
    folder: Path | None = None
    """The run folder; None before the run has one."""
    trained: Sequence[Any] = ()
    """The reward models that the run trains: their folders, or the `ScalarModel` of each where it
    is loaded."""
    load_scalar: Callable[[str], Any] | None = None
    """Returns the `ScalarModel` of a folder or hub id, frozen and in its precision, as the run's
    ranks hold it; None: each process reads it whole."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Rewards that were given as Python objects, by name."""

    def reads_ids(self, model: str, label: int | None = None) -> bool:
        """Return whether a reward model can read the policy's token ids as they are: it is a
        decoder with the policy's tokenizer and one score."""
        from quartet.models.language_model import read_config
        from quartet.models.text_classifier import reads_tokens_of

        has_one_score = read_config(model).num_labels == 1 and label is None
        return reads_tokens_of(model, self.tokenizer) and has_one_score

    def trained_models(self, name: str, label: int | None = None) -> list[Reward]:
        """Return the rewards, all of this name, of the reward models that the run trains."""
        from quartet.rewards.reward_model import ModelReward

        return [
            self.load_model(name, str(model), label)
            if isinstance(model, Path)
            else ModelReward(model, self.micro_batch_tokens, name)
            for model in self.trained
        ]

    def load_model(self, name: str, model: str, label: int | None = None) -> Reward:
        """Return the reward named `name` of a reward model, a folder or hub id. One that reads
        other tokens than the policy's is given the text instead of the ids."""
        from quartet.models.actor_critic import freeze
        from quartet.models.heads import ScalarModel
        from quartet.rewards.reward_model import ModelReward
        from quartet.rewards.text_models import TextModelReward

        if self.reads_ids(model, label):
            if self.load_scalar is not None:
                return ModelReward(self.load_scalar(model), self.micro_batch_tokens, name)
            loaded = freeze(ScalarModel.load(model, self.device))
            if self.dtype is not None:
                loaded.compute_in(self.dtype)
            return ModelReward(loaded, self.micro_batch_tokens, name)
        return TextModelReward.load(
            name, model, label, self.micro_batch_tokens, self.device, self.dtype
        )


@dataclass(frozen=True)
class RewardSource(Family):
    """Where scores come from. The fields of a subclass are its settings.

    A subclass implements `__call__`. One whose reward holds something while the run goes on, such
    as a model or a connection, implements `make` instead and returns an object of its own.
    """

    _: KW_ONLY
    weight: float = Field(default=1.0, kw_only=True, description=WEIGHT)
    name: str | None = Field(default=None, kw_only=True, description=NAME)

    per_stage: ClassVar[bool] = False
    """Whether each stage makes the reward anew when it begins, as it must where the reward loads a
    model. Others are made once, before any model is loaded, so that mistakes are found early."""
    gives_token_scores: ClassVar[bool] = False
    """Whether the reward has `token_scores`: a score for each token of a response."""

    @property
    def called(self) -> str:
        """The name of the reward in metrics and rollouts."""
        return self.name or self.type.rpartition(":")[2]

    @property
    def column(self) -> str | None:
        """The column that every row of the data must have for it; None where it needs none."""
        return None

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        """Return one number for each rollout, in their order; None where there is no score."""
        raise NotImplementedError(f"{type(self).__name__} has neither __call__ nor make")

    def make(self, context: RewardContext) -> Reward:
        """Return the reward; by default one that calls the source, in this process."""
        return SourceReward(self)


class SourceReward:
    """The reward whose scores a source computes itself."""

    def __init__(self, source: RewardSource) -> None:
        self.name, self.source = source.called, source

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one number, or None, for each rollout. Raises `RewardError` where the source
        fails, or returns something else than numbers."""
        try:
            scores = list(self.source(rollouts))
            return [None if score is None else float(score) for score in scores]
        except Exception as error:
            raise RewardError(f"reward {self.name} failed: {error!r}.") from error


__all__ = ["RewardContext", "RewardSource", "SourceReward"]
