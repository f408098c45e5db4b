"""The doctor: applies the rules to a stage while it runs, or to the stages of a run folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quartet.runs.rules import RULES, TOLERANCES, History, Rule, Tolerance

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
    rules: Mapping[Rule, int] = field(default_factory=lambda: RULES)
    """The rules, each with the number of steps in a row for which it must hold."""
    keep_mask: bool = False
    """Whether the filtered distribution is the one that is trained."""
    history: History = field(init=False)
    held: dict[Rule, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history = History(self.kl_target, self.filtered, self.tolerance, self.keep_mask)

    def see(self, metrics: Mapping[str, float]) -> list[tuple[Rule, str]]:
        """Add a step; return the rules that hold at it for the first time, and their sentences."""
        return [
            (rule, sentence)
            for rule, sentence, count in self.look(metrics)
            if count == self.rules[rule]
        ]

    def look(self, metrics: Mapping[str, float]) -> list[tuple[Rule, str, int]]:
        """Add a step; return the rules that hold at it, with their sentences and for how many steps
        in a row they have held."""
        self.history.add(metrics)
        found = []
        for rule in self.rules:
            sentence = rule(self.history)
            self.held[rule] = 0 if sentence is None else self.held.get(rule, 0) + 1
            if sentence is not None:
                found.append((rule, sentence, self.held[rule]))
        return found


def unread(problems: Sequence[str]) -> list[Finding]:
    """Return a finding, of no stage, for each problem of reading a run folder."""
    why = "What cannot be read is left out; everything else is shown as the run wrote it."
    return [Finding("could_not_be_read", "", 0, sentence, why, 0) for sentence in problems]


def examine(run: "Run") -> list[Finding]:
    """Apply all rules to all stages of a run. Return the findings, ordered by the step at which
    they first held."""
    target = run.config.get("algorithm", {}).get("kl", {}).get("controller", {}).get("target")
    rollout = run.config.get("rollout", {})
    filtered = bool(rollout.get("top_k", 0)) or rollout.get("top_p", 1.0) < 1
    keep_mask = bool(rollout.get("keep_mask", False))
    found: dict[tuple[str, Rule | None], Finding] = {}
    for stage, series in run.series.items():
        watch = Watch(target, filtered, TOLERANCES[run.rounding], keep_mask=keep_mask)
        if len(series.steps) > MAX_STEPS:
            sentence = (
                f"{stage} has {len(series.steps):,} steps; the rules looked at the first "
                f"{MAX_STEPS:,} of them."
            )
            found[stage, None] = Finding(
                "too_many_steps",
                stage,
                MAX_STEPS,
                sentence,
                "To look at all of them would take minutes.",
                MAX_STEPS,
            )
        for i, step in enumerate(series.steps[:MAX_STEPS]):
            metrics = {
                name: column[i]
                for name, column in series.columns.items()
                if not math.isnan(column[i])
            }
            for rule, sentence, count in watch.look(metrics):
                before = found.get((stage, rule))
                if before is not None:
                    found[stage, rule] = Finding(
                        before.rule, stage, before.step, sentence, before.why, step
                    )
                elif count >= RULES[rule]:
                    why = " ".join((rule.__doc__ or "").split())
                    found[stage, rule] = Finding(rule.__name__, stage, step, sentence, why, step)
    return sorted([*found.values(), *_own(run)], key=lambda finding: finding.step)


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
