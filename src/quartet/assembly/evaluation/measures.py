"""The measures of an evaluation: any reward of the answers, accuracy, perplexity and KL."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quartet.assembly.device import device
from quartet.assembly.evaluation.answers import Answer, plain, rollout_of
from quartet.assembly.evaluation.policies import MICRO_BATCH_TOKENS, EvaluationError, is_run
from quartet.assembly.evaluation.sets import Choice, Needs
from quartet.assembly.named import resolved_model
from quartet.assembly.rewards import check_reward_model
from quartet.assembly.serving import TextScorer
from quartet.data.examples import Example
from quartet.evaluation.at_k import best_of
from quartet.experience import Rollout
from quartet.models.language_model import read_config
from quartet.models.precision import dtype_of
from quartet.rewards.judge import JudgeReward, WinShares
from quartet.rewards.objects import ObjectSource, object_name
from quartet.rewards.protocol import Reward, RewardError, Score
from quartet.rewards.rubric import Rubric, read_rubric
from quartet.rewards.serve import BadRequest, ScoringRequest
from quartet.rewards.source import RewardContext, RewardSource
from quartet.rewards.sources import (
    EnsembleSource,
    ExactSource,
    JudgeSource,
    MathSource,
    ModelSource,
    NumberSource,
    StepsSource,
    is_trained_here,
)
from quartet.rewards.text_models import TextModelReward
from quartet.rewards.verifiable import final_number

SOURCE: TypeAdapter[RewardSource] = TypeAdapter(RewardSource)
ARGUMENT = {"model": "model", "function": "function", "pattern": "pattern", "server": "url"}
"""The setting that follows the colon of a reward's short form."""
PAIRWISE = "pairwise"


@dataclass(frozen=True)
class Measure:
    """A number of each row."""

    name: str
    needs: Needs
    source: RewardSource | None = None
    """The reward that scores the answers; None for accuracy, perplexity and KL."""
    higher_is_better: bool = True
    given: Any = None
    """The Python object that `source` names, where it is an `ObjectSource`."""

    @property
    def is_pairwise(self) -> bool:
        """Whether a judge compares each answer with the one of the policy compared with."""
        return isinstance(self.source, JudgeSource) and self.source.mode == PAIRWISE

    def rubric(self) -> Rubric | None:
        """Return the rubric of a judge, None where there is none. Raises RewardError for a file
        that is none."""
        file = self.source.rubric if isinstance(self.source, JudgeSource) else None
        return None if file is None else read_rubric(Path(file))

    @property
    def is_verifier(self) -> bool:
        return getattr(self.source, "type", "") in {"exact", "number", "math", "code", "json"}


ACCURACY = Measure("accuracy", "choices")
PERPLEXITY = Measure("perplexity", "texts", higher_is_better=False)
KL = Measure("kl", "prompts", higher_is_better=False)
WITHOUT_REWARD = {measure.name: measure for measure in (ACCURACY, PERPLEXITY, KL)}


def measure_of(words: Any, has_rival: bool, rubric: str | None = None) -> Measure:
    """Return the measure that words of the command name: accuracy, perplexity, kl, or a reward. A
    reward is a type (`gold`, `number`), a type with its main setting (`model:FOLDER`,
    `judge:URL#MODEL`), or a `[[reward]]` table; in Python also a function. Without another policy
    to compare with (`has_rival`), a judge scores answers one by one. A judge that has no rubric of
    its own uses the file `rubric`. Raises EvaluationError."""
    if isinstance(words, Measure):
        return words
    if isinstance(words, RewardSource):
        return Measure(words.called, "prompts", words)
    if is_object(words):
        return _measure_by(words)
    if isinstance(words, str) and words in WITHOUT_REWARD:
        return WITHOUT_REWARD[words]
    table = dict(words) if isinstance(words, Mapping) else _table(str(words))
    if table.get("type") == "judge":
        table = ({} if rubric is None else {"rubric": rubric}) | table
        if "mode" not in table and (has_rival or "rubric" in table):
            table["mode"] = PAIRWISE
    if table.get("type") in {"model", "steps"} and isinstance(table.get("model"), str):
        table["model"] = _reward_model(table["model"])
    try:
        source = SOURCE.validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        if first["type"] == "union_tag_invalid":
            known = ", ".join(sorted(RewardSource.members))
            what = f"no such measure. There are {', '.join(WITHOUT_REWARD)}, and rewards: {known}"
        raise EvaluationError(f"--measure {words}: {what}.") from None
    return Measure(source.called, "prompts", source)


def is_object(words: Any) -> bool:
    """Whether a measure is a function, or an object with a method `score`."""
    return not isinstance(words, Measure | RewardSource) and (
        callable(words) or hasattr(words, "score")
    )


def _measure_by(given: Any) -> Measure:
    """Return the measure that is a function, or an object with a method `score`. Raises
    EvaluationError for a model: it would be given the ids of another tokenizer."""
    name = object_name(given)
    if isinstance(given, type) or hasattr(given, "parameters"):
        raise EvaluationError(
            f"--measure {name}: is no function. Name the folder of a reward model, model:FOLDER; "
            "of a class, give an instance."
        )
    return Measure(name, "prompts", ObjectSource(object=name), given=given)


def _table(words: str) -> dict[str, Any]:
    """Return the `[[reward]]` table of a reward's short form, or of an inline table."""
    if words.lstrip().startswith("{"):
        try:
            return dict(tomllib.loads(f"measure = {words}")["measure"])
        except tomllib.TOMLDecodeError as error:
            raise EvaluationError(f"--measure {words}: not a TOML table ({error}).") from None
    kind, colon, rest = words.partition(":")
    if kind == "judge" and colon:
        url, _, model = rest.partition("#")
        if not model:
            raise EvaluationError(f"--measure {words}: name the judge's model: judge:URL#MODEL.")
        if not url.endswith("/completions"):
            url = url.rstrip("/") + "/chat/completions"
        return {"type": kind, "url": url, "model": model}
    return {"type": kind} | ({ARGUMENT.get(kind, "name"): rest} if colon else {})


def _reward_model(model: str) -> str:
    """Return the folder or hub id of a reward model; of a run, that of the one it trained."""
    path = Path(model)
    return str(path / "reward_model") if is_run(path) else model


class ScoredText:
    """A reward model that reads the text of answers, whatever policy they are from."""

    def __init__(self, name: str, model: str, label: int | None = None) -> None:
        """Raises ModelError. `model` is a folder or hub id."""
        self.name, self.text_model, self.scorer = name, None, None
        place = device("auto")
        folder = str(resolved_model("reward model", model))
        if label is None and Path(folder).is_dir():
            self.scorer = TextScorer(Path(folder), place, MICRO_BATCH_TOKENS)
        else:
            self.text_model = TextModelReward.load(
                name, folder, label, MICRO_BATCH_TOKENS, place, dtype_of("auto", place)
            )

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        if self.text_model is not None:
            return self.text_model.score(rollouts)
        assert self.scorer is not None
        prompts = [r.prompt.messages or r.prompt.text for r in rollouts]
        ended = [r.finish_reason == "stop" for r in rollouts]
        try:
            return self.scorer(ScoringRequest(prompts, [r.response for r in rollouts], ended))
        except BadRequest as error:
            raise RewardError(f"reward {self.name}: {error}") from None


@dataclass(frozen=True)
class TextContext(RewardContext):
    """What rewards are made from here: reward models read text, because the answers come from
    policies with different tokenizers."""

    def load_model(self, name: str, model: str, label: int | None = None) -> Reward:
        return ScoredText(name, model, label)


def check_reward(measure: Measure, gold: Any, run: Path | None) -> None:
    """Check what can be known of a measure's reward before answers are sampled for it: the gold
    reward's world, the folders of reward models, a judge's prompt, a function's file. `gold` is the
    world's, `run` the one whose reward model is meant where none is named. Raises a QuartetError.
    """
    source = measure.source
    if source is None:
        return
    if source.type == "gold" and gold is None:
        raise EvaluationError(
            "--measure gold: no policy is a run in a world that knows the gold reward "
            "(data.world). Use a reward model, a verifier or a judge."
        )
    if is_trained_here(source):
        if not _trained(run):
            raise EvaluationError(
                f"--measure {source.type}: no run here has trained a reward model. Name one: "
                "model:FOLDER or model:RUN."
            )
    elif isinstance(source, EnsembleSource):
        for model in source.models or ():
            check_reward_model(model)
    elif isinstance(source, ModelSource) and source.model is not None:
        check_reward_model(source.model, source.label)
    elif isinstance(source, StepsSource):
        read_config(source.model)
    else:
        source.make(_context(measure, gold, None, run))


def _trained(run: Path | None) -> list[Path]:
    """Return the folders of the reward models that a run has trained."""
    return [] if run is None else sorted(p for p in run.glob("reward_model*") if p.is_dir())


def reward_of(measure: Measure, gold: Any, folder: Path, run: Path | None) -> Reward:
    """Return the reward of a measure, which `check_reward` has passed. `folder` is the
    evaluation's, which keeps a judge's verdicts."""
    assert measure.source is not None
    return measure.source.make(_context(measure, gold, folder, run))


def _context(measure: Measure, gold: Any, folder: Path | None, run: Path | None) -> TextContext:
    place, source = device("auto"), measure.source
    return TextContext(
        None,  # type: ignore[arg-type]  # no reward here reads the policy's tokens
        None,  # nor their texts
        MICRO_BATCH_TOKENS,
        place,
        dtype_of("auto", place),
        gold=gold,
        folder=folder,
        trained=_trained(run),
        objects={source.object: measure.given} if isinstance(source, ObjectSource) else {},
    )


def scores_of(
    reward: Reward, examples: Sequence[Example], answers: Sequence[Answer], samples: int
) -> list[Score]:
    """Return the score of each answer. Raises EvaluationError where a row has no column that the
    reward compares with."""
    rollouts = [
        rollout_of(examples[i // samples], i // samples, i % samples, answer)
        for i, answer in enumerate(answers)
    ]
    return reward.score(rollouts)


def check_column(measure: Measure, examples: Sequence[Example]) -> None:
    """Raise EvaluationError where a row lacks the column that a reward compares answers with."""
    column = None if measure.source is None else measure.source.column
    if column is None:
        return
    if lacking := next((e for e in examples if column not in e.extra), None):
        raise EvaluationError(
            f"{lacking.id}: has no column {column}, which {measure.name} compares with."
        )


def compared(
    reward: JudgeReward,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    rivals: Sequence[Answer],
    samples: int,
) -> WinShares:
    """Return what a pairwise judge says of each answer against the rival's of the same place: 1,
    ½ or 0, and the same by each criterion of its rubric."""
    rollouts = []
    for i, pair in enumerate(zip(answers, rivals, strict=True)):
        for side, answer in enumerate(pair):
            rollout = rollout_of(examples[i // samples], i, i % samples, answer)
            rollouts.append(dataclasses.replace(rollout, id=f"{rollout.id}/{side}"))
    both = reward.compare(rollouts)
    of_answers = {name: shares[::2] for name, shares in both.criteria.items()}
    return WinShares(both.scores[::2], of_answers)


def right_choices(reward: Reward, choices: Sequence[Choice]) -> list[Score]:
    """Return for each row whether the chosen answer scores highest (`best_of`)."""
    rollouts = [
        _given(example, group)
        for group, choice in enumerate(choices)
        for example in (choice.chosen, *choice.rejected)
    ]
    scores, values = iter(reward.score(rollouts)), []
    for choice in choices:
        chosen, rejected = next(scores), [next(scores) for _ in choice.rejected]
        known = [score for score in rejected if score is not None]
        complete = chosen is not None and len(known) == len(rejected)
        values.append(best_of(chosen, known) if chosen is not None and complete else None)
    return values


def _given(example: Example, group: int) -> Rollout:
    """Return an answer that a row has, as a rollout."""
    completion = example.completion
    assert completion is not None
    if not isinstance(completion, str):
        earlier = [] if isinstance(example.prompt, str) else list(example.prompt)
        example = dataclasses.replace(example, prompt=[*earlier, *completion[:-1]])
        completion = plain(completion[-1:])
    answer = Answer(completion, True, len(completion.split()))
    return rollout_of(example, group, 0, answer)


def vote_of(source: RewardSource | None, response: str) -> Any:
    """Return what an answer votes for in maj@k: the number or expression that its verifier reads,
    or its text; None where there is none."""
    if isinstance(source, NumberSource):
        return final_number(response)
    if isinstance(source, MathSource):
        import math_verify

        parsed = math_verify.parse(response)
        return str(parsed[0]) if parsed else None
    return re.sub(r"\s+", " ", response).strip() or None


def votes(measure: Measure) -> bool:
    """Return whether answers can be counted by what they say, as maj@k does."""
    return isinstance(measure.source, ExactSource | NumberSource | MathSource)
