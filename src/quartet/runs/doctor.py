"""The doctor: applies the rules to a stage while it runs, or to the stages of a run folder."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quartet.runs.history import TOLERANCES, History, Rule, Terms, Tolerance
from quartet.runs.rules import RULES

if TYPE_CHECKING:
    from quartet.runs.reader import Run

MAX_STEPS = 100_000
"""The steps of a stage that are examined; the rest is left out."""


@dataclass(frozen=True)
class Finding:
    """What a rule found in a stage."""

    rule: str
    stage: str
    step: int
    sentence: str
    why: str
    """The rule's reason and source."""
    until: int
    """The last step at which it still held."""


@dataclass
class Watch:
    """Applies the rules to the steps of one stage as they come."""

    kl_target: float | None = None
    filtered: bool = False
    """Whether top-k or top-p is on, so that the sampled distribution is known to differ from the
    trained one, unless `keep_mask` is on."""
    tolerance: Tolerance = TOLERANCES["fp32"]
    rules: Mapping[Rule, Terms] = field(default_factory=lambda: RULES)
    keep_mask: bool = False
    """Whether the filtered distribution is the one that is trained."""
    starts_at_reference: bool = True
    """Whether the reference is the model that the stage starts from, and no other."""
    history: History = field(init=False)
    held: dict[Rule, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history = History(
            self.kl_target,
            self.filtered,
            self.tolerance,
            self.keep_mask,
            self.starts_at_reference,
        )

    def see(self, metrics: Mapping[str, float]) -> list[tuple[Rule, str]]:
        """Add a step; return the rules that hold at it for the first time, and their sentences."""
        return self._new(self.look(metrics))

    def finish(self, summary: Mapping[str, Any]) -> list[tuple[Rule, str]]:
        """Add the summary of the finished stage; return the rules that hold because of it for the
        first time, and their sentences."""
        return self._new(self.look_at_end(summary))

    def look(self, metrics: Mapping[str, float]) -> list[tuple[Rule, str, int]]:
        """Add a step; return the rules that hold at it, with their sentences and for how many steps
        in a row they have held."""
        self.history.add(metrics)
        return self._apply(self.rules)

    def look_at_end(self, summary: Mapping[str, Any]) -> list[tuple[Rule, str, int]]:
        """Add the summary of the finished stage; return those rules that hold and read it."""
        self.history.finish(summary)
        return self._apply(rule for rule, terms in self.rules.items() if terms.at_end)

    def applies(self, rule: Rule) -> bool:
        """Whether the stage has recorded what the rule reads."""
        return all(name in self.history.columns for name in self.rules[rule].reads)

    def _apply(self, rules: Iterable[Rule]) -> list[tuple[Rule, str, int]]:
        found = []
        for rule in rules:
            sentence = rule(self.history) if self.applies(rule) else None
            self.held[rule] = 0 if sentence is None else self.held.get(rule, 0) + 1
            if sentence is not None:
                found.append((rule, sentence, self.held[rule]))
        return found

    def _new(self, found: Iterable[tuple[Rule, str, int]]) -> list[tuple[Rule, str]]:
        return [
            (rule, sentence) for rule, sentence, count in found if count == self.rules[rule].steps
        ]


def unread(problems: Sequence[str]) -> list[Finding]:
    """Return a finding, of no stage, for each problem of reading a run folder."""
    why = "What cannot be read is left out; everything else is shown as the run wrote it."
    return [Finding("could_not_be_read", "", 0, sentence, why, 0) for sentence in problems]


def why(rule: Rule) -> str:
    """Return a rule's reason and source."""
    return " ".join((rule.__doc__ or "").split())


@dataclass(frozen=True)
class Check:
    """What a rule that applies to a stage has looked at."""

    rule: str
    metric: str
    value: float
    """The value of the metric that the rule judges."""
    fired: bool


@dataclass(frozen=True)
class Diagnosis:
    """What all rules say of a run."""

    findings: list[Finding]
    """In the order of the steps at which they first held."""
    checks: dict[str, list[Check]]
    """The rules that apply, by stage."""

    @property
    def num_applied(self) -> int:
        """How many of the rules apply to any stage."""
        return len({check.rule for checks in self.checks.values() for check in checks})


def examine(run: "Run") -> list[Finding]:
    """Apply all rules to all stages of a run. Return the findings, ordered by the step at which
    they first held."""
    return diagnose(run).findings


def diagnose(run: "Run") -> Diagnosis:
    """Apply all rules to all stages of a run."""
    target = run.config.get("algorithm", {}).get("kl", {}).get("controller", {}).get("target")
    rollout = run.config.get("rollout", {})
    filtered = bool(rollout.get("top_k", 0)) or rollout.get("top_p", 1.0) < 1
    filtered = filtered or rollout.get("min_new_tokens", 0) > 0
    keep_mask = bool(rollout.get("keep_mask", False))
    starts_at_reference = not run.config.get("reference", {}).get("model")
    findings: list[Finding] = []
    checks: dict[str, list[Check]] = {}
    for stage in run.series:
        watch = Watch(
            target,
            filtered,
            TOLERANCES[run.rounding],
            keep_mask=keep_mask,
            starts_at_reference=starts_at_reference and stage not in run.rl_stages[1:],
        )
        found = _examine_stage(run, stage, watch)
        findings += found
        checks[stage] = list(_checks(watch, {finding.rule for finding in found}))
    findings = sorted([*findings, *_own(run)], key=lambda finding: finding.step)
    return Diagnosis(findings, checks)


def _examine_stage(run: "Run", stage: str, watch: Watch) -> list[Finding]:
    """Show a watch all steps of a stage and its summary. Return the findings."""
    series, found = run.series[stage], dict[str, Finding]()

    def add(step: int, holding: Iterable[tuple[Rule, str, int]]) -> None:
        for rule, sentence, count in holding:
            name, before = rule.__name__, found.get(rule.__name__)
            if before is not None:
                found[name] = replace(before, sentence=sentence, until=step)
            elif count >= RULES[rule].steps:
                found[name] = Finding(name, stage, step, sentence, why(rule), step)

    for i, step in enumerate(series.steps[:MAX_STEPS]):
        metrics = {
            name: column[i] for name, column in series.columns.items() if not math.isnan(column[i])
        }
        add(step, watch.look(metrics))
    if len(series.steps) > MAX_STEPS:
        return [_too_many_steps(stage, len(series.steps)), *found.values()]
    summary = run.summary(stage)
    if summary is not None and series.steps:
        add(series.steps[-1], watch.look_at_end(summary))
    return list(found.values())


def _too_many_steps(stage: str, count: int) -> Finding:
    sentence = f"{stage} has {count:,} steps; the rules looked at the first {MAX_STEPS:,} of them."
    why = "To look at all of them would take minutes."
    return Finding("too_many_steps", stage, MAX_STEPS, sentence, why, MAX_STEPS)


def _checks(watch: Watch, fired: Collection[str]) -> Iterator[Check]:
    """Yield what each rule that applies to a stage has looked at."""
    for rule, terms in watch.rules.items():
        if watch.applies(rule):
            column = watch.history.columns[terms.reads[0]]
            value = column[0 if terms.first else -1]
            yield Check(rule.__name__, terms.reads[0], value, rule.__name__ in fired)


def _own(run: "Run") -> list[Finding]:
    """Return the findings of the rules of the user's own metrics, from the record: the rules
    themselves are code that a reader does not have."""
    own = {row.name: row.what for row in run.definitions}
    found: dict[tuple[str, str], Finding] = {}
    for warning in run.warnings:
        name, stage = warning.get("rule"), warning["stage"]
        if not isinstance(name, str) or name not in own:
            continue
        first = found.get((stage, name))
        step, sentence = warning["step"], warning["sentence"]
        begin = step if first is None else first.step
        found[stage, name] = Finding(name, stage, begin, sentence, own[name], step)
    return list(found.values())
