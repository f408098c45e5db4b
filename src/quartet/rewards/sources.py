"""The kinds of `[[reward]]` tables that Quartet has. Nothing here imports torch until a reward is
made."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from quartet.parts import Field
from quartet.rewards.objects import ObjectSource  # noqa: F401  registers itself
from quartet.rewards.protocol import Reward, RewardError
from quartet.rewards.source import RewardContext, RewardSource


class AnswerSource(RewardSource):
    """Compares the response with a column."""

    abstract = True

    answer: str = Field(default="answer", description="The column with the answer.")

    @property
    def column(self) -> str | None:
        return self.answer


class ModelSource(RewardSource):
    """A reward model: a folder or hub id of any sequence classifier with one label, or the one that
    this run trains."""

    type: Literal["model"] = "model"
    per_stage: ClassVar[bool] = True
    gives_token_scores: ClassVar[bool] = True
    model: str | None = None
    label: int | None = Field(
        default=None, ge=0, description="Which label is the score, where the model has several."
    )

    def make(self, context: RewardContext) -> Reward:
        if self.model is not None:
            return context.load_model(self.called, self.model, self.label)
        [reward] = context.trained_models(self.called, self.label)
        return reward


class EnsembleSource(RewardSource):
    """Several reward models as one: their mean, the mean less k deviations, or the worst case."""

    type: Literal["ensemble"] = "ensemble"
    models: Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        default=None,
        description="Folders or hub ids, two or more. Left out, they are those that this run "
        "trains (reward_model.members).",
    )
    per_stage: ClassVar[bool] = True
    weights: tuple[float, ...] | None = Field(
        default=None, description="One for each model. Left out, they are equal."
    )
    combine: Literal["mean", "lower_bound", "min"] = "mean"
    k: float = Field(
        default=1.0, ge=0, description="How many deviations lower_bound goes below the mean."
    )

    def __post_init__(self) -> None:
        if self.models is not None and (problem := self.weights_problem(len(self.models))):
            raise ValueError(problem)

    def weights_problem(self, count: int) -> str | None:
        """Return what is wrong with the weights of so many models; None if nothing is."""
        weights = self.weights
        if weights is None or (len(weights) == count and min(weights) >= 0 < sum(weights)):
            return None
        return f"weights = {list(weights)}: needs one number ≥ 0 for each of {count} models"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.combine import EnsembleReward

        members = (
            context.trained_models(self.called)
            if self.models is None
            else [context.load_model(self.called, model) for model in self.models]
        )
        return EnsembleReward(self.called, members, self.weights, self.combine, self.k)


def is_trained_here(source: RewardSource) -> bool:
    """Return whether a reward is the reward model, or the ensemble, that the run trains."""
    return (isinstance(source, ModelSource) and source.model is None) or (
        isinstance(source, EnsembleSource) and source.models is None
    )


class FunctionSource(RewardSource):
    """A Python function of yours."""

    function: str = Field(description="file.py:name, or package.module.name.")
    type: Literal["function"] = "function"
    gives_token_scores: ClassVar[bool] = True
    timeout: float = Field(default=60.0, gt=0, description="Seconds that one call may take.")
    processes: int = Field(
        default=1, ge=1, le=256, description="How many processes share the responses of a step."
    )

    @property
    def called(self) -> str:
        return self.name or self.function.replace(":", ".").rpartition(".")[2]

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.functions import FunctionReward

        return FunctionReward(
            self.called, self.function, context.token_texts, self.timeout, self.processes
        )


class ExactSource(AnswerSource):
    """1 where the response is the answer in the prompt's row."""

    type: Literal["exact"] = "exact"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import ExactMatch

        return ExactMatch(self.called, self.answer)


class NumberSource(AnswerSource):
    """1 where the response's final number is that of the answer; GSM8K's `####` is understood."""

    type: Literal["number"] = "number"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import NumberMatch

        return NumberMatch(self.called, self.answer)


class MathSource(AnswerSource):
    """1 where the response's final expression equals the answer, as mathematics."""

    type: Literal["math"] = "math"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import MathMatch

        return MathMatch(self.called, self.answer)


class PatternSource(RewardSource):
    """1 where a regular expression is found in the response."""

    pattern: str = Field(
        description="The regular expression, as Python's re.search takes it.",
    )
    type: Literal["pattern"] = "pattern"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import PatternMatch

        return PatternMatch(self.pattern, self.called)


class JsonSource(RewardSource):
    """1 where the response is JSON, and fits the schema if one is named."""

    type: Literal["json"] = "json"
    schema_file: str | None = Field(default=None, description="A file with a JSON schema.")

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import JsonMatch

        schema = None if self.schema_file is None else _json_file(self.schema_file)
        return JsonMatch(schema, self.called)


class LengthSource(RewardSource):
    """1 for a response of `least` to `most` tokens, less outside."""

    most: int = Field(
        ge=1,
        description="The tokens of a response up to which the reward is 1.",
    )
    type: Literal["length"] = "length"
    least: int = Field(
        default=1,
        ge=1,
        description="The tokens of a response from which the reward is 1.",
    )

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least = {self.least} is more than most = {self.most}")

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.verifiable import LengthWithin

        return LengthWithin(self.least, self.most, self.called)


URL = r"^https?://[^/@\s]+(/\S*)?$"
"""No user or password in it, which would stand in every copy of the config: reward.token_env is for
that."""


class ServerSource(RewardSource):
    """A reward server over HTTP."""

    url: str = Field(
        pattern=URL, description="http:// or https://, the whole address that is posted to."
    )
    type: Literal["server"] = "server"
    protocol: Literal["quartet", "openrlhf"] = Field(
        default="quartet",
        description="What is posted: Quartet's own requests, or those of OpenRLHF's remote "
        "reward models.",
    )
    timeout: float = Field(
        default=30.0, gt=0, description="Seconds that one try may take as a whole."
    )
    tries: int = Field(
        default=3,
        ge=1,
        description="How often a request is sent before the run stops. Typical: 3.",
    )
    token_env: str | None = Field(
        default=None, description="The environment variable with the token; never the token itself."
    )
    batch: int = Field(default=256, ge=1, description="Responses in one request.")

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.remote import Endpoint, ServerReward

        endpoint = Endpoint("reward server", self.url, self.timeout, self.tries, self.token_env)
        return ServerReward(self.called, endpoint, self.protocol, self.batch)


class JudgeSource(RewardSource):
    """A language model as judge, behind an OpenAI-compatible endpoint."""

    url: str = Field(
        pattern=URL,
        description="The whole address, such as http://127.0.0.1:8000/v1/chat/completions.",
    )
    model: str = Field(description="What the endpoint calls the judge.")
    type: Literal["judge"] = "judge"
    per_stage: ClassVar[bool] = True
    mode: Literal["score", "pairwise"] = Field(
        default="score",
        description='"score" asks for a number for each answer, "pairwise" which of two '
        "answers to a prompt is better.",
    )
    prompt: str | None = Field(
        default=None, description="A file with the judge's prompt. Left out, Quartet's own."
    )
    cache: str | None = Field(
        default=None, description="A file with earlier verdicts. Left out, it is in the run folder."
    )
    timeout: float = Field(
        default=60.0, gt=0, description="Seconds that one try may take as a whole."
    )
    tries: int = Field(
        default=3,
        ge=1,
        description="How often a question is sent before it counts as not answered. Typical: 3.",
    )
    parallel: int = Field(
        default=8, ge=1, description="How many requests are on their way at once."
    )
    token_env: str | None = Field(
        default=None, description="The environment variable with the token; never the token itself."
    )
    rubric: str | None = Field(
        default=None,
        description="A TOML file of criteria with weights, by which a pairwise judge compares; the "
        "weighted sum decides.",
    )
    score_range: tuple[float, float] = Field(
        default=(1.0, 10.0),
        description="The lowest and highest score that the prompt asks for; another number is no "
        "score.",
    )

    def __post_init__(self) -> None:
        low, high = self.score_range
        if not 0 <= low < high:
            raise ValueError(
                f"score_range = {list(self.score_range)}: needs two numbers, 0 ≤ lowest < highest"
            )
        if self.rubric is not None and self.mode != "pairwise":
            raise ValueError(
                'rubric: its criteria compare two answers. Set mode = "pairwise", or leave it out'
            )

    def make(self, context: RewardContext) -> Reward:
        """Return the judge. Its prompt, its rubric and its cache are kept in the run folder, where
        there is one."""
        from quartet import files
        from quartet.rewards.judge import JudgeReward
        from quartet.rewards.remote import Endpoint
        from quartet.rewards.rubric import read_rubric

        cache = None if self.cache is None else Path(self.cache)
        folder = None if context.folder is None else context.folder / "judge"
        judge = JudgeReward(
            self.called,
            Endpoint("judge", self.url, self.timeout, self.tries, self.token_env),
            self.model,
            self.mode,
            None if self.prompt is None else _prompt_file(self.prompt),
            folder / f"{self.called}.jsonl" if cache is None and folder is not None else cache,
            self.parallel,
            self.score_range,
            None if self.rubric is None else read_rubric(Path(self.rubric)),
        )
        if folder is not None:
            folder.mkdir(exist_ok=True)
            files.replace(folder / f"{self.called}.txt", judge.prompt)
            if judge.rubric is not None:
                files.replace(folder / f"{self.called}.rubric.txt", judge.rubric.text)
        return judge


class StepsSource(RewardSource):
    """A process reward model: a token classifier that scores each step of a response."""

    model: str
    type: Literal["steps"] = "steps"
    per_stage: ClassVar[bool] = True
    gives_token_scores: ClassVar[bool] = True
    separator: str = Field(default="\n\n", min_length=1, description="What ends a step.")
    label: int | None = Field(
        default=None, ge=0, description="Which label is a good step. Left out: the last."
    )
    combine: Literal["min", "mean", "last"] = Field(
        default="min", description="The response's score from its steps'."
    )

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.text_models import StepReward

        return StepReward(
            self.called,
            self.model,
            self.separator,
            self.label,
            self.combine,
            context.token_texts,
            context.device,
            context.dtype,
        )


class CodeSource(RewardSource):
    """Python programs against the tests of the prompt's row, run in a sandbox."""

    type: Literal["code"] = "code"
    tests: str = Field(default="tests", description="The column with the tests.")
    score: Literal["all", "share"] = Field(
        default="all", description="1 for all tests passed, or the share that is."
    )
    seconds: float = Field(default=10.0, gt=0, le=3600, description="Wall time of one program.")
    memory_mb: int = Field(default=512, ge=64, description="Memory of one program, in MiB.")
    parallel: int = Field(default=2, ge=1, description="How many programs run at once.")

    @property
    def column(self) -> str | None:
        return self.tests

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.code import CodeReward
        from quartet.rewards.sandbox import Sandbox

        sandbox = Sandbox(self.seconds, self.memory_mb)
        return CodeReward(self.called, sandbox, self.tests, self.score, self.parallel)


class EnvironmentSource(RewardSource):
    """What the environment gives, turn by turn."""

    type: Literal["environment"] = "environment"
    gives_token_scores: ClassVar[bool] = True

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.environment import EnvironmentReward

        return EnvironmentReward(self.called)


class GoldSource(RewardSource):
    """The gold reward of a world."""

    type: Literal["gold"] = "gold"

    def make(self, context: RewardContext) -> Reward:
        from quartet.rewards.functions import TextReward

        assert context.gold is not None, "the config has refused gold without a world"
        return TextReward(self.called, context.gold)


def _prompt_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RewardError(f'reward.prompt = "{file}": no such file.') from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RewardError(f'reward.prompt = "{file}": cannot be read: {reason}.') from None


def _json_file(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RewardError(f'reward.schema_file = "{file}": no such file.') from None
    except ValueError as error:
        raise RewardError(f'reward.schema_file = "{file}": not JSON: {error}.') from None
