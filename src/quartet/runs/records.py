"""What the files of a run folder hold, as far as it is read: the types and ranges that every reader
may rely on."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from quartet.runs.untrusted import Folder, Unreadable, checked, parse_json

MAX_STEP = 10**9
"""Steps are smaller, as in the addresses of the studio."""
MAX_LINE = 4 << 20
"""The most bytes of a line of events.jsonl or answers.jsonl."""
MAX_TEXT = 1 << 20
"""The most characters of a text in an event or a summary."""

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")
]
"""Printable, so that it is safe in a terminal."""
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Step = Annotated[int, Field(ge=0, lt=MAX_STEP)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
"""A time since 1970, or a duration: below the year 5138."""


class Record(BaseModel):
    """A table with the entries that are read. Other entries are allowed; nothing is converted."""

    model_config = ConfigDict(strict=True, extra="allow")


# --- events.jsonl


class Event(Record):
    event: Name
    time: Seconds
    stage: Name | None = None
    step: Step | None = None


class MetricsEvent(Event):
    stage: Name
    step: Step
    metrics: dict[Name, float | None]
    """NaN and infinity are allowed: a run that diverged has them."""
    phases: dict[Name, float | None] | None = None
    seconds: Seconds = 0.0


class StartedEvent(Event):
    stage: Name


class Summary(Record):
    ceiling: Finite | None = None


class FinishedEvent(Event):
    stage: Name
    summary: Summary = Summary()


class WarningEvent(Event):
    stage: Name
    step: Step
    sentence: Text


class FailedEvent(Event):
    error: Text


class ClipRecord(Record):
    """Over which ratios the policy loss keeps the gradient; a bound that is left out is none."""

    low: Size = 0.0
    high: Size | None = None
    cap: Size | None = None
    of_response: bool = False


class OwnMetric(Record):
    """A user-defined metric, as the run described it."""

    name: Name
    label: Name
    what: Text = ""
    reading: Text = ""
    chart: Text = ""
    percent: bool = False
    exact: bool = False


class DefinitionsEvent(Event):
    """Descriptions of user-defined parts, which a reader cannot import."""

    stage: Name
    clip: ClipRecord | None = None
    metrics: list[OwnMetric] = []
    rounding: Literal["fp32", "bf16", "engine", "engine, bf16"] = "fp32"


EVENTS: "dict[str, TypeAdapter[Any]]" = {
    "metrics": TypeAdapter(MetricsEvent),
    "started": TypeAdapter(StartedEvent),
    "finished": TypeAdapter(FinishedEvent),
    "warning": TypeAdapter(WarningEvent),
    "failed": TypeAdapter(FailedEvent),
    "definitions": TypeAdapter(DefinitionsEvent),
}
OTHER_EVENT: "TypeAdapter[Any]" = TypeAdapter(Event)


def parse_event(line: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the event of a line of events.jsonl, and a sentence for each entry that was left out
    of it. Unreadable where the line is no event."""
    value, problems = parse_json(line)
    kind = value.get("event") if isinstance(value, dict) else None
    event, more = checked(
        EVENTS.get(kind, OTHER_EVENT) if isinstance(kind, str) else OTHER_EVENT, value
    )
    if event is None:
        raise Unreadable(f"is no event ({[*problems, *more][0]}).")
    return event, [*problems, *more]


def read_lines(folder: Folder, name: str) -> Iterator[bytes]:
    """Yield the lines of a file, of each at most MAX_LINE + 1 bytes; nothing where there is no
    file."""
    file = folder.open(name)
    if file is None:
        return
    with file:
        while line := file.readline(MAX_LINE + 1):
            yield line
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)


# --- documents


class IntervalRecord(Record):
    mean: Finite
    interval: Finite


class SamplePair(Record):
    prompt: Text
    before: Text
    after: Text


class EvaluationRecord(Record):
    """evaluation/final.json."""

    judge: Name
    prompts: Annotated[int, Field(ge=0)]
    win_rate: IntervalRecord
    kl: IntervalRecord
    before: dict[Name, float | None]
    after: dict[Name, float | None]
    samples: list[SamplePair] = []


class BestOfRecord(Record):
    """An entry of evaluation/best_of_n.json."""

    n: Annotated[int, Field(ge=1)]
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    reward: Finite | None = None
    gold: Finite | None = None


class AnswerRecord(Record):
    response: Text
    score: float | None


class AnswerPair(Record):
    """A line of evaluation/answers.jsonl."""

    prompt: Text
    kl: float | None
    before: AnswerRecord
    after: AnswerRecord


# --- config.resolved.toml


class RewardShaping(Record):
    whiten: bool = False


class ControllerRecord(Record):
    target: Size | None = None


class KlRecord(Record):
    controller: ControllerRecord = ControllerRecord()


class AlgorithmRecord(Record):
    rewards: RewardShaping = RewardShaping()
    kl: KlRecord = KlRecord()


class RolloutRecord(Record):
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_new_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    keep_mask: bool = False


class DataRecord(Record):
    train: Text | list[Text] = ""
    world: Text = ""


class PolicyRecord(Record):
    """The table of the policy, or of the reference."""

    model: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")] = ""


class ResolvedConfig(Record):
    """The entries of a resolved config that readers use; the rest is only displayed."""

    recipe: list[Name] = []
    algorithm: AlgorithmRecord = AlgorithmRecord()
    rollout: RolloutRecord = RolloutRecord()
    data: DataRecord = DataRecord()
    policy: PolicyRecord = PolicyRecord()
    reference: PolicyRecord = PolicyRecord()


CONFIG = TypeAdapter(ResolvedConfig)
EVALUATION = TypeAdapter(EvaluationRecord)
BEST_OF_N = TypeAdapter(list[BestOfRecord])
ANSWERS = TypeAdapter(AnswerPair)
ENVIRONMENT = TypeAdapter(dict[Name, Any])
"""env.json: versions and hardware, by name."""


def mean_pairs(members: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return held-out pairs with the mean of the scores that the reward models of an ensemble give
    them. Pairs that not all members have, because a file is damaged, are left out."""
    sides = ("chosen_score", "rejected_score")
    texts = ("prompt", "chosen", "rejected")
    by_text: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    if len(members) < 2:
        return [row for rows in members for row in rows]
    for rows in members:
        for row in rows:
            by_text.setdefault(tuple(row[text] for text in texts), []).append(row)
    return [
        rows[0] | {side: sum(row[side] for row in rows) / len(rows) for side in sides}
        for rows in by_text.values()
        if len(rows) >= len(members)
    ]
