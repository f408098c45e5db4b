"""What the doctor's rules are, and the metrics of a stage that they read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

RECENT = 5
"""Steps that a rule takes the mean of."""
MANY_CLIPPED = 0.5
"""The share of scores beyond the limit of `algorithm.scores` that is more than outliers."""
WIN_RATES = 3
"""Win rates of which one mean is taken: each is of 32 prompts, ± 0.17."""
MAX_NUMBER = 1e15
"""A number of a summary is smaller; a larger one, an infinity or a NaN is left out."""
HELD_OUT = "held_out/"
"""What the names of metrics on held-out rows begin with."""


@dataclass(frozen=True)
class Tolerance:
    """How far from each other numbers may be that are equal but for rounding."""

    sampler_noted: float
    """The mean ratio, less 1, of the sampler's and the learner's probabilities that is reported."""
    sampler_wrong: float
    """The same, where the run stops."""
    growth: float
    """How many times the gap of step 1 stops the run as well, once it is above `growth_from`: a
    sampler that does not get new weights begins with a small gap."""
    growth_from: float
    ratio: float
    """The largest |ratio − 1| before the first optimizer step."""
    kl: float
    """The KL per token between two models with the same weights."""


TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-4, math.inf, math.inf, 1e-3, 1e-4),
    "bf16": Tolerance(0.03, 0.10, 5.0, 0.03, 0.5, 5e-3),
    "engine": Tolerance(0.03, 0.10, 5.0, 0.03, 1e-3, 1e-4),
    "engine, bf16": Tolerance(0.03, 0.10, 5.0, 0.03, 0.5, 5e-3),
}
"""Tolerances by what samples: the learner's own module in float32 ("fp32") or in bfloat16 ("bf16"),
or another program with its own kernels, for a learner in float32 ("engine") or in bfloat16
("engine, bf16"). docs/doctor.md says how they were found."""


class History:
    """The metrics of a stage so far, by name."""

    def __init__(
        self,
        kl_target: float | None = None,
        filtered: bool = False,
        tolerance: Tolerance = TOLERANCES["fp32"],
        keep_mask: bool = False,
        starts_at_reference: bool = True,
    ) -> None:
        self.kl_target, self.tolerance = kl_target, tolerance
        self.filtered = filtered and not keep_mask
        """Whether the learner's distribution is not the one that was sampled from."""
        self.renormalized = filtered and keep_mask
        """Whether it is the filtered one, while the reference's is not."""
        self.starts_at_reference = starts_at_reference
        """Whether the reference is the model that the stage starts from."""
        self.steps = 0
        self.columns: dict[str, list[float]] = {}
        self.latest: Mapping[str, float] = {}
        """The metrics of the latest step."""
        self.best_wins, self.best_place = -math.inf, 0
        """The highest mean of WIN_RATES neighbouring win rates, and which was the first of them."""

    def add(self, metrics: Mapping[str, float]) -> None:
        self.steps += 1
        self.latest = metrics
        for name, value in metrics.items():
            if not math.isnan(value):
                self.columns.setdefault(name, []).append(value)
        wins = self.columns.get("policy/win_rate", ())
        if (
            "policy/win_rate" in metrics
            and len(wins) >= WIN_RATES
            and (mean := sum(wins[-WIN_RATES:]) / WIN_RATES) > self.best_wins
        ):
            self.best_wins, self.best_place = mean, len(wins) - WIN_RATES

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add what the summary of the finished stage says of held-out rows: `held_out_loss` becomes
        the last value of `held_out/loss`. Of an evaluation, `after` becomes `held_out/gold` and so
        on, `before` becomes `held_out/gold_before`, and the interval of the win rate is
        `held_out/win_rate_low` to `held_out/win_rate_high`."""
        numbers = {
            name.removeprefix("held_out_"): value
            for name, value in summary.items()
            if name.startswith("held_out_")
        }
        for side, ending in (("before", "_before"), ("after", "")):
            if isinstance(measures := summary.get(side), Mapping):
                numbers |= {f"{name}{ending}": value for name, value in measures.items()}
        if isinstance(win := summary.get("win_rate"), Mapping):
            mean, half = win.get("mean"), win.get("interval")
            if isinstance(mean, int | float) and isinstance(half, int | float):
                numbers |= {"win_rate_low": mean - half, "win_rate_high": mean + half}
        for name, value in numbers.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and abs(value) < MAX_NUMBER:
                self.columns.setdefault(HELD_OUT + name, []).append(float(value))

    @property
    def is_taught(self) -> bool:
        """Whether the KL in the loss is that to another model, which is a gradient without
        rewards."""
        return not self.starts_at_reference and self.now("loss/kl", 0.0) > 0

    @property
    def pays_all_alike(self) -> bool:
        """Whether responses earned the same, or nearly so: what a critic says of them, and what
        advantages they have, is noise then."""
        spread, first = self.recent("reward/std"), self.first("reward/std")
        alike = spread is not None and first is not None and spread <= 0.1 * first
        return alike or self.clips_most_scores

    @property
    def clips_most_scores(self) -> bool:
        """Whether more scores than those of outliers were beyond the limit of `algorithm.scores`,
        in the last three steps."""
        share = self.recent("reward/clipped", 3)
        return share is not None and share > MANY_CLIPPED

    def now(self, name: str, default: float) -> float:
        """The latest value."""
        column = self.columns.get(name)
        return column[-1] if column else default

    def recent(self, name: str, count: int = RECENT) -> float | None:
        """The mean of the last steps; None until there are as many."""
        column = self.columns.get(name, ())
        return None if len(column) < count else sum(column[-count:]) / count

    def first(self, name: str, count: int = RECENT) -> float | None:
        """The mean of the first steps; None until as many others came after them."""
        column = self.columns.get(name, ())
        return None if len(column) < 2 * count else sum(column[:count]) / count


Rule = Callable[[History], str | None]


@dataclass(frozen=True)
class Terms:
    """What a rule looks at, and when it speaks."""

    reads: tuple[str, ...]
    """Metrics without which the rule does not apply to a stage; the first is the one it judges."""
    steps: int = 1
    """For how many steps in a row the rule must hold before it speaks."""
    first: bool = False
    """Whether it judges the first value of the metric, and not the latest."""

    @property
    def at_end(self) -> bool:
        """Whether the rule is applied to the summary of a finished stage as well."""
        return any(name.startswith(HELD_OUT) for name in self.reads)


def moving_means(values: Sequence[float], width: int) -> list[float]:
    """Of each `width` neighbours."""
    sums = [0.0, *accumulate(values)]
    return [(after - before) / width for before, after in zip(sums, sums[width:], strict=False)]


def roughness(values: Sequence[float]) -> float:
    """The deviation of single values from their course: that of neighbours' differences, over
    √2."""
    steps = [b - a for a, b in pairwise(values)]
    return math.sqrt(sum(d * d for d in steps) / max(len(steps), 1) / 2)
