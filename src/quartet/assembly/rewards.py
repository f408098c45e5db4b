"""The rewards of a run, created from the `[[reward]]` tables of its config."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quartet.data import DataError
from quartet.experience import Prompt
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, read_config
from quartet.rewards.code import checked_tests
from quartet.rewards.protocol import Reward
from quartet.rewards.source import RewardContext, RewardSource
from quartet.rewards.sources import (
    CodeSource,
    EnsembleSource,
    JudgeSource,
    ModelSource,
    NumberSource,
    StepsSource,
    is_trained_here,
)
from quartet.rewards.text_models import the_label
from quartet.rewards.verifiable import final_number


def check_reward_model(model: str, label: int | None = None) -> None:
    """Raise ModelError for a folder or hub id that is no reward model, or has no such label."""
    config = read_config(model)
    kinds = config.architectures or ["ForSequenceClassification"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"{model}: is a {kinds[0]}, not a reward model. A reward model is a "
            "ForSequenceClassification with one label; the stage reward_model trains one."
        )
    the_label(model, config.num_labels, label)


@dataclass
class RewardMaker:
    """Checks the sources of rewards, and creates each reward: once per run, or once per stage for
    sources that load a model."""

    context: RewardContext
    rewards: dict[str, Reward] = field(default_factory=dict)
    """The rewards that are created once, by the name of their source."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the user should read before the run starts."""

    def check(
        self, sources: Sequence[RewardSource], per_token: bool, backbone: str | None = None
    ) -> None:
        """Check what is known of the sources before a model is loaded, and create the rewards that
        load none. `backbone` is what the run trains reward models from, where they do not read the
        policy's tokens."""
        for source in sources:
            if is_trained_here(source):
                if backbone is not None and source.weight:
                    self._check_reads_text(f"reward_model.model = {backbone}", per_token)
            elif isinstance(source, EnsembleSource):
                for model in source.models or ():
                    self._check_model(source, model, None, per_token)
            elif isinstance(source, ModelSource) and source.model is not None:
                self._check_model(source, source.model, source.label, per_token)
            elif isinstance(source, StepsSource):
                read_config(source.model)
            elif isinstance(source, JudgeSource):
                source.make(self.context)  # raises if its prompt, token or cache cannot be used
            elif not source.per_stage:
                self.rewards[source.called] = source.make(self.context)

    def _check_model(
        self, source: RewardSource, model: str, label: int | None, per_token: bool
    ) -> None:
        """Check that a folder holds a reward model that this run can use, and note if its tokenizer
        is not the policy's."""
        check_reward_model(model, label)
        if not self.context.reads_ids(model, label) and source.weight:
            self._check_reads_text(model, per_token)

    def _check_reads_text(self, model: str, per_token: bool) -> None:
        """Note that a reward model reads text and not the policy's tokens. Raises ModelError where
        the algorithm needs a score for each of these."""
        if per_token:
            raise ModelError(
                f"{model}: policy and reward model use different tokenizers, so it has no "
                "score for each of the policy's tokens. "
                'Use algorithm.rewards.type = "last_token".'
            )
        self.notes.append(
            f"policy and reward model {model} use different tokenizers: text is re-encoded for "
            "the reward model; per-token rewards are not available."
        )

    def check_prompts(self, prompts: Iterable[Prompt], sources: Sequence[RewardSource]) -> None:
        """Check that each prompt has the columns that the rewards compare responses with. Raises
        `DataError`."""
        columns = [(source, source.column) for source in sources if source.column is not None]
        for prompt in prompts if columns else ():
            for source, column in columns:
                if column not in prompt.extra:
                    kind = getattr(source, "type", "")
                    raise DataError(
                        f'{prompt.id}: has no column {column}, which reward.type = "{kind}" '
                        "compares with."
                    )
                answer = prompt.extra[column]
                if isinstance(source, CodeSource):
                    checked_tests(prompt.id, column, answer)
                if isinstance(source, NumberSource) and final_number(str(answer)) is None:
                    raise DataError(f'{prompt.id}: there is no number in its {column}: "{answer}".')

    def make(
        self,
        source: RewardSource,
        trained: Sequence[Path | ScalarModel],
        folder: Path,
        load_scalar: Callable[[str], ScalarModel] | None = None,
    ) -> Reward:
        """Return the reward of a source. `trained` are the reward models that this run trains, or
        their folders; `folder` is the run's. `load_scalar` loads a reward model that all ranks
        ask; others are whole in each process."""
        if not source.per_stage:
            return self.rewards[source.called]
        if not isinstance(source, ModelSource):
            load_scalar = None  # one rank asks it
        context = replace(self.context, trained=trained, folder=folder, load_scalar=load_scalar)
        return source.make(context)
