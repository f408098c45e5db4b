"""Reading a sweep's folder, while it goes on or afterwards: its trials, what they reached, and what
each searched key has to do with it. Imports no trainer and no torch.

A trial is one setting of the searched keys; it has a run for each seed. The folder is not trusted:
`untrusted` opens and checks what is read.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from quartet.runs.folders import RECORD, SWEEP
from quartet.runs.reader import RECENT_SECONDS, NoRun, Run
from quartet.runs.records import Event, Finite, Name, Record, Text, read_lines
from quartet.runs.untrusted import Folder, Unreadable, checked, parse_json, printable

LAST = 5
"""How many values of a metric at the end of a run are averaged."""
EVALUATED = {
    "gold": ("after", "gold"),
    "held_out_reward": ("after", "reward"),
    "win_rate": ("win_rate", "mean"),
    "held_out_kl": ("kl", "mean"),
}
"""The measures of the evaluation stage, and where they stand in evaluation/final.json. Any other
name is that of a metric."""
WHILE_TRAINING = {
    "gold": "reward/gold",
    "held_out_reward": "reward",
    "win_rate": "policy/win_rate",
    "held_out_kl": "kl",
}
"""The metric that is known of such a measure while a run trains."""
MAX_TRIALS = 10_000
GROUPS, MOST_VALUES = 3, 6
"""Numbers of a key are divided into three groups if there are more than six different ones."""

State = Literal["waiting", "running", "done", "pruned", "failed"]
WORST_FIRST: tuple[State, ...] = ("pruned", "failed", "running")
"""The states of one run that are those of its trial."""


class SweepEvent(Event):
    """The first line: what the sweep is."""

    objective: Name
    direction: Literal["maximize", "minimize"]
    method: Name
    keys: list[Name]
    trials: int = Field(ge=0, le=MAX_TRIALS)
    seeds: list[int]
    at_most: dict[Name, Finite] = Field(default_factory=dict)


class SuggestedEvent(Event):
    trial: int = Field(ge=0, lt=MAX_TRIALS)
    values: dict[Name, Any]


class StartedRun(Event):
    trial: int = Field(ge=0, lt=MAX_TRIALS)
    seed: int


Point = Annotated[list[Finite], Field(min_length=2, max_length=2)]
"""A step and a value."""


class EndedRun(StartedRun):
    state: Literal["done", "pruned", "failed"]
    run: Name | None = None
    objective: Finite | None = None
    measures: dict[Name, Finite] = Field(default_factory=dict)
    curve: list[Point] = Field(default_factory=list)
    reason: Text = ""
    by: Name | None = None


EVENTS: "dict[str, TypeAdapter[Any]]" = {
    "sweep": TypeAdapter(SweepEvent),
    "suggested": TypeAdapter(SuggestedEvent),
    "started": TypeAdapter(StartedRun),
    "ended": TypeAdapter(EndedRun),
}
OTHER: "TypeAdapter[Any]" = TypeAdapter(Record)


@dataclass
class TrialRun:
    """The run of a trial with one seed."""

    seed: int
    state: State = "waiting"
    run: str | None = None
    """The name of its run folder, below the sweep's."""
    objective: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    """Its KL and the measures that have a bound, by name."""
    curve: dict[int, float] = field(default_factory=dict)
    """The objective while it trained, by step."""
    reason: str = ""
    """Why it was pruned or failed."""
    by: str | None = None
    """What pruned it: "median", or a rule of the doctor."""


@dataclass
class Trial:
    """One setting of the searched keys."""

    number: int
    values: dict[str, Any]
    runs: dict[int, TrialRun]
    """By seed."""
    at_most: Mapping[str, float] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """pruned or failed where one of its runs is; done where all are; else running or
        waiting."""
        states = [run.state for run in self.runs.values()]
        for state in WORST_FIRST:
            if state in states:
                return state
        return "done" if states and set(states) == {"done"} else "waiting"

    @property
    def objectives(self) -> list[float]:
        """The objective of each run that is done."""
        runs = self.runs.values()
        return [r.objective for r in runs if r.state == "done" and r.objective is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the objective over seeds; None before a run is done."""
        return statistics.fmean(self.objectives) if self.objectives else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the objective over seeds (n − 1); None for fewer than two."""
        return statistics.stdev(self.objectives) if len(self.objectives) > 1 else None

    def measure(self, name: str) -> float | None:
        """Return the mean over seeds of a measure that has a bound, or of the KL."""
        runs = [run for run in self.runs.values() if run.state == "done"]
        values = [run.measures[name] for run in runs if name in run.measures]
        return statistics.fmean(values) if values else None

    @property
    def violations(self) -> dict[str, float]:
        """How far each bounded measure is above its bound; negative below it."""
        return {
            name: value - bound
            for name, bound in self.at_most.items()
            if (value := self.measure(name)) is not None
        }

    @property
    def is_allowed(self) -> bool:
        """Whether all bounds are kept."""
        found = self.violations
        return len(found) == len(self.at_most) and all(v <= 0 for v in found.values())

    @property
    def reason(self) -> str:
        """Why it was pruned or failed; empty where it was not."""
        return next((run.reason for run in self.runs.values() if run.reason), "")


class Sweep:
    """The folder of a sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.name = printable(self.path.name)
        self.facts: dict[str, Any] = {}
        self.trials: dict[int, Trial] = {}
        self.problems: list[str] = []
        self._ended: str | None = None
        self.refresh()

    def __repr__(self) -> str:
        done = sum(trial.state == "done" for trial in self.trials.values())
        return f"sweep {self.name}: {self.status}, {done} of {len(self.trials)} trials done"

    def refresh(self) -> None:
        """Read the record again. Raises `NoRun` where it is none of a sweep."""
        self.facts, self.trials, self.problems, self._ended = {}, {}, [], None
        damaged = 0
        try:
            for line in read_lines(Folder(self.path), SWEEP):
                damaged += not self._see(line)
        except Unreadable as error:
            raise NoRun(f"{self.name}: {SWEEP} {error}") from None
        if not self.facts:
            raise NoRun(f"{printable(str(self.path))}: is no sweep, it has no {SWEEP}.")
        if damaged:
            self.problems.append(f"{SWEEP}: {damaged} line{'s' * (damaged != 1)} left out.")

    def _see(self, line: bytes) -> bool:
        """Add a line of the record; return whether it could be read."""
        try:
            value, _ = parse_json(line)
            kind = value.get("event") if isinstance(value, dict) else None
            event, faults = checked(EVENTS.get(str(kind), OTHER), value)
        except Unreadable:
            return False
        if event is None or not isinstance(kind, str):
            return False
        self.problems += [f"{SWEEP}: {fault}; it is left out." for fault in faults]
        if kind == "sweep":
            self.facts = event
        elif kind in {"done", "stopped", "failed"}:
            self._ended = kind
        elif self.facts and kind in EVENTS:
            self._ended = None
            return self._see_trial(kind, event)
        return True

    def _see_trial(self, kind: str, event: Mapping[str, Any]) -> bool:
        number = event["trial"]
        if kind == "suggested":
            runs = {seed: TrialRun(seed) for seed in self.facts["seeds"]}
            bounds = self.facts.get("at_most", {})
            self.trials[number] = Trial(number, event["values"], runs, bounds)
            return True
        run = self.trials[number].runs.get(event["seed"]) if number in self.trials else None
        if run is None:
            return False
        if kind == "started":
            run.state, run.reason, run.by = "running", "", None
            return True
        run.state, run.run = event["state"], event.get("run")
        run.objective, run.measures = event.get("objective"), event.get("measures", {})
        run.curve = {int(step): value for step, value in event.get("curve", [])}
        run.reason, run.by = event.get("reason", ""), event.get("by")
        return True

    @property
    def status(self) -> str:
        """done, failed, stopped, or running: nothing has ended it, and it or one of its runs has
        written something in the last five minutes."""
        if self._ended is not None:
            return self._ended
        records = [self.path / SWEEP, *self.path.glob(f"*/{RECORD}")]
        written = max((_modified(path) for path in records), default=0.0)
        return "running" if time.time() - written < RECENT_SECONDS else "stopped"

    # --- results

    @property
    def objective(self) -> str:
        """The name of the measure that is compared."""
        return str(self.facts["objective"])

    @property
    def keys(self) -> list[str]:
        """The searched keys."""
        return list(self.facts["keys"])

    def ranked(self) -> list[Trial]:
        """Return the trials with an objective, the best first: those that keep all bounds before
        the others."""
        sign = -1 if self.facts["direction"] == "maximize" else 1
        done = [trial for trial in self.trials.values() if trial.state == "done"]
        return sorted(
            (trial for trial in done if trial.mean is not None),
            key=lambda trial: (not trial.is_allowed, sign * (trial.mean or 0.0), trial.number),
        )

    @property
    def best(self) -> Trial | None:
        """The best trial that keeps all bounds; None where there is none."""
        first = next(iter(self.ranked()), None)
        return first if first is not None and first.is_allowed else None

    def importance(self) -> dict[str, tuple[float, float]]:
        """Return, by key, its share of the variance of the objective, and the share that a key
        without any effect has on average.

        The share is η² = Σ_g n_g (mean_g − mean)² / Σ_i (y_i − mean)² over the runs that are done,
        where a group g has one value of the key; more than six different numbers are
        divided into thirds. Without effect its expectation is (groups − 1) / (runs − 1).
        """
        rows = [(t, y) for t in self.trials.values() if t.state == "done" for y in t.objectives]
        ys = [y for _, y in rows]
        if len(ys) < 3 or math.isclose(max(ys), min(ys)):
            return {}
        return {
            key: _explained([trial.values.get(key) for trial, _ in rows], ys) for key in self.keys
        }

    @property
    def noise(self) -> float | None:
        """The share of the variance of the objective that is between seeds of one trial."""
        done = [t for t in self.trials.values() if t.state == "done" and t.objectives]
        ys = [y for trial in done for y in trial.objectives]
        if len(ys) < 3 or math.isclose(max(ys), min(ys)):
            return None
        within = sum((y - (trial.mean or 0.0)) ** 2 for trial in done for y in trial.objectives)
        mean = statistics.fmean(ys)
        return within / sum((y - mean) ** 2 for y in ys)


def _explained(values: Sequence[Any], ys: Sequence[float]) -> tuple[float, float]:
    """Return η² of groups of equal values, and its expectation without effect."""
    groups: dict[Any, list[float]] = {}
    for label, y in zip(_labels(values), ys, strict=True):
        groups.setdefault(label, []).append(y)
    mean = statistics.fmean(ys)
    between = sum(len(g) * (statistics.fmean(g) - mean) ** 2 for g in groups.values())
    return between / sum((y - mean) ** 2 for y in ys), (len(groups) - 1) / (len(ys) - 1)


def _labels(values: Sequence[Any]) -> list[Any]:
    """Return the group of each value: the value, or the third that a number is in."""
    texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
    distinct = sorted({v for v in values if _is_number(v)})
    if len(distinct) <= MOST_VALUES or not all(map(_is_number, values)):
        return list(texts)
    third = {v: GROUPS * place // len(distinct) for place, v in enumerate(distinct)}
    return [third[v] for v in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _modified(path: Path) -> float:
    """Return when a file was last written; 0 where there is none."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


# --- what a run reached


def measured(run: Run, name: str) -> float | None:
    """Return a measure of a run at its end; None where it recorded none. It is of the evaluation if
    its name is in EVALUATED, else the mean of the last values of a metric, in the last stage that
    has it."""
    if name in EVALUATED:
        table, key = EVALUATED[name]
        value = ((run.evaluation or {}).get(table) or {}).get(key)
        return value if _is_number(value) else None
    for series in reversed(list(run.series.values())):
        numbers = [x for x in series.columns.get(name, ()) if math.isfinite(x)][-LAST:]
        if numbers:
            return sum(numbers) / len(numbers)
    return None


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    """Return a measure while the run trained, as pairs of step and the mean of the last values up
    to it: of a measure of the evaluation, the metric that stands for it."""
    metric = WHILE_TRAINING.get(name, name)
    for series in reversed(list(run.series.values())):
        points = zip(series.steps, series.columns.get(metric, ()), strict=False)
        numbers = [(step, x) for step, x in points if math.isfinite(x)]
        if numbers:
            values = [x for _, x in numbers]
            means = [values[max(0, i - LAST + 1) : i + 1] for i in range(len(values))]
            return [(s, sum(m) / len(m)) for (s, _), m in zip(numbers, means, strict=True)]
    return []
