"""Metrics of a user's own: a number of each RL step, with its description, chart and rule."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quartet.parts import Family
from quartet.runs.definitions import Definition
from quartet.runs.history import History, Rule

if TYPE_CHECKING:
    from quartet.loops.rl import Step


class Metric(Family):
    """A number of each RL step, recorded beside Quartet's own metrics: in events.jsonl, the
    trackers, the charts and the doctor.

    A subclass implements `__call__`. Its docstring says what the number is; readers show it. The
    fields of a subclass are its settings.
    """

    accepts_name: ClassVar[bool] = True
    name: ClassVar[str] = ""
    """Its name in events.jsonl. Left out: `own/` and the name of the class."""
    label: ClassVar[str] = ""
    """Its name in charts. Left out: made from the class's name."""
    reading: ClassVar[str] = ""
    """How to read it: which values are good, which are not."""
    chart: ClassVar[str] = ""
    """The title of the chart that shows it; metrics with the same title share a chart. Left out:
    the label."""
    percent: ClassVar[bool] = False
    """Whether the chart is in percent."""
    exact: ClassVar[bool] = False
    """Whether the number is set or counted and not estimated from samples; it is never drawn
    smoothed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", cls.__name__).lower()
        if "name" not in cls.__dict__:
            cls.name = f"own/{words.replace(' ', '_')}"
        if "label" not in cls.__dict__:
            cls.label = words

    def __call__(self, step: "Step") -> float | None:
        """Return the number of a step; None where this step has none."""
        raise NotImplementedError

    def check(self, history: History) -> str | None:
        """Return what is wrong with the run so far and what to do, in a sentence, or None: a rule
        of the doctor's, asked at every step. By default it finds nothing."""
        return None

    @property
    def definition(self) -> Definition:
        """What readers of the run, who do not import this class, show of it."""
        what = " ".join((inspect.getdoc(type(self)) or "").split())
        chart = self.chart or self.label
        return Definition(
            self.name, self.label, what, self.reading, chart, self.percent, self.exact
        )


def measured(
    step: "Step", metrics: Sequence[Metric], failed: set[str]
) -> "tuple[Step, list[tuple[str, str]]]":
    """Return the step with the user's own metrics among its own, and a sentence by name for each
    that fails for the first time. `failed` holds the names of those that failed before; they are
    asked again at every step, without a sentence."""
    values, sentences = dict(step.metrics), []
    for metric in metrics:
        try:
            if metric.name in values:
                raise ValueError("another metric has this name; give it another")
            value = metric(step)
            if value is not None:
                values[metric.name] = float(value)
        except Exception as error:
            if metric.name not in failed:
                reason = f"metric {metric.name} failed and is left out of this step: {error!r}."
                sentences.append((metric.name, reason))
            failed.add(metric.name)
    return replace(step, metrics=values), sentences


def rule_of(metric: Metric) -> Rule:
    """Return the metric's rule in the form of the doctor's own: a function with the metric's name,
    which never raises."""

    def rule(history: History) -> str | None:
        try:
            return metric.check(history)
        except Exception as error:
            return f"the rule of metric {metric.name} failed: {error!r}."

    rule.__name__, rule.__doc__ = metric.name, metric.definition.what
    return rule


__all__ = ["Metric", "measured", "rule_of"]
