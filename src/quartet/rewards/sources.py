"""Where scores come from, as a run's file says it: one `[[reward]]` table for each. Known without
torch."""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

from quartet.parts import Field, part

WEIGHT = "What it counts for in the score, which is the weighted sum. 0: watched only."
NAME = "What metrics and rollouts call it. Left out: the type, or the function's name."


@part
class Source:
    _: KW_ONLY
    weight: float = Field(default=1.0, description=WEIGHT)
    name: str | None = Field(default=None, description=NAME)

    @property
    def called(self) -> str:
        return self.name or str(getattr(self, "type", ""))

    @property
    def column(self) -> str | None:
        """The column of the data that it cannot do without."""
        return None


@part
class AnswerSource(Source):
    """Compares the response with a column."""

    answer: str = Field(default="answer", description="The column with the answer.")

    @property
    def column(self) -> str | None:
        return self.answer


@part
class ModelSource(Source):
    """A reward model: a folder or hub id of any sequence classifier with one label, or the one that
    this run trains."""

    type: Literal["model"] = "model"
    model: str | None = None
    label: int | None = Field(
        default=None, ge=0, description="Which label is the score, where the model has several."
    )


@part
class EnsembleSource(Source):
    """Several reward models as one: their mean, the mean less k deviations, or the worst case."""

    models: tuple[str, ...] = Field(min_length=2, description="Folders or hub ids, two or more.")
    type: Literal["ensemble"] = "ensemble"
    weights: tuple[float, ...] | None = Field(
        default=None, description="One for each model. Left out, they are equal."
    )
    combine: Literal["mean", "lower_bound", "min"] = "mean"
    k: float = Field(
        default=1.0, ge=0, description="How many deviations lower_bound goes below the mean."
    )

    def __post_init__(self) -> None:
        if self.weights is not None and (
            len(self.weights) != len(self.models) or min(self.weights) < 0 or not sum(self.weights)
        ):
            raise ValueError(
                f"weights = {list(self.weights)}: needs one number ≥ 0 for each of "
                f"{len(self.models)} models"
            )


@part
class FunctionSource(Source):
    """A Python function of yours."""

    function: str = Field(description="file.py:name, or package.module.name.")
    type: Literal["function"] = "function"
    timeout: float = Field(default=60.0, gt=0, description="Seconds that one call may take.")
    processes: int = Field(
        default=1, ge=1, le=256, description="How many processes share the responses of a step."
    )

    @property
    def called(self) -> str:
        return self.name or self.function.replace(":", ".").rpartition(".")[2]


@part
class ExactSource(AnswerSource):
    """1 where the response is the answer in the prompt's row."""

    type: Literal["exact"] = "exact"


@part
class NumberSource(AnswerSource):
    """1 where the response's final number is that of the answer; GSM8K's `####` is understood."""

    type: Literal["number"] = "number"


@part
class MathSource(AnswerSource):
    """1 where the response's final expression equals the answer, as mathematics."""

    type: Literal["math"] = "math"


@part
class PatternSource(Source):
    """1 where a regular expression is found in the response."""

    pattern: str
    type: Literal["pattern"] = "pattern"


@part
class JsonSource(Source):
    """1 where the response is JSON, and fits the schema if one is named."""

    type: Literal["json"] = "json"
    schema_file: str | None = Field(default=None, description="A file with a JSON schema.")


@part
class LengthSource(Source):
    """1 for a response of `least` to `most` tokens, less outside."""

    most: int = Field(ge=1)
    type: Literal["length"] = "length"
    least: int = Field(default=1, ge=1)

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least = {self.least} is more than most = {self.most}")


URL = r"^https?://[^/@\s]+(/\S*)?$"
"""No user or password in it, which would stand in every copy of the config: reward.token_env is for
that."""


@part
class ServerSource(Source):
    """A reward server over HTTP."""

    url: str = Field(
        pattern=URL, description="http:// or https://, the whole address that is posted to."
    )
    type: Literal["server"] = "server"
    protocol: Literal["quartet", "openrlhf"] = "quartet"
    timeout: float = Field(
        default=30.0, gt=0, description="Seconds that one try may take as a whole."
    )
    tries: int = Field(default=3, ge=1)
    token_env: str | None = Field(
        default=None, description="The environment variable with the token; never the token itself."
    )
    batch: int = Field(default=256, ge=1, description="Responses in one request.")


@part
class JudgeSource(Source):
    """A language model as judge, behind an OpenAI-compatible endpoint."""

    url: str = Field(
        pattern=URL,
        description="The whole address, such as http://127.0.0.1:8000/v1/chat/completions.",
    )
    model: str = Field(description="What the endpoint calls the judge.")
    type: Literal["judge"] = "judge"
    mode: Literal["score", "pairwise"] = "score"
    prompt: str | None = Field(
        default=None, description="A file with the judge's prompt. Left out, Quartet's own."
    )
    cache: str | None = Field(
        default=None, description="A file with earlier verdicts. Left out, it is in the run folder."
    )
    timeout: float = Field(
        default=60.0, gt=0, description="Seconds that one try may take as a whole."
    )
    tries: int = Field(default=3, ge=1)
    parallel: int = Field(
        default=8, ge=1, description="How many requests are on their way at once."
    )
    token_env: str | None = Field(
        default=None, description="The environment variable with the token; never the token itself."
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


@part
class StepsSource(Source):
    """A process reward model: a token classifier that scores each step of a response."""

    model: str
    type: Literal["steps"] = "steps"
    separator: str = Field(default="\n\n", min_length=1, description="What ends a step.")
    label: int | None = Field(
        default=None, ge=0, description="Which label is a good step. Left out: the last."
    )
    combine: Literal["min", "mean", "last"] = Field(
        default="min", description="The response's score from its steps'."
    )


@part
class CodeSource(Source):
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


@part
class EnvironmentSource(Source):
    """What the environment gives, turn by turn."""

    type: Literal["environment"] = "environment"


@part
class GoldSource(Source):
    """The gold reward of a world."""

    type: Literal["gold"] = "gold"


RewardSource = Annotated[
    ModelSource
    | EnsembleSource
    | FunctionSource
    | ExactSource
    | NumberSource
    | MathSource
    | PatternSource
    | JsonSource
    | LengthSource
    | ServerSource
    | JudgeSource
    | StepsSource
    | CodeSource
    | EnvironmentSource
    | GoldSource,
    Field(discriminator="type"),
]
PER_TOKEN = (ModelSource, FunctionSource, StepsSource, EnvironmentSource)
"""Those that can give a number per token."""
