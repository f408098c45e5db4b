"""Which metrics are drawn together, and in which order the charts stand on a page."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quartet.runs.definitions import LOGGED, Definition, definition, sentence

if TYPE_CHECKING:
    from quartet.runs.reader import Series


@dataclass(frozen=True)
class Chart:
    """Metrics that are drawn in one chart."""

    title: str
    metrics: tuple[str, ...]
    """Names, or patterns such as `loss/*`."""
    percent: bool = False


CHARTS = (
    Chart("Reward", ("reward", "reward/gold")),
    Chart("KL to the reference, nats", ("kl",)),
    Chart("Pair accuracy", ("accuracy", "held_out/accuracy"), percent=True),
    Chart("Response length, tokens", ("response/tokens",)),
    Chart("Correlation of reward and length", ("reward/length_correlation",)),
    Chart("Tokens of continuations", ("continuations/tokens",)),
    Chart("Turns", ("response/turns",)),
    Chart(
        "Shares of responses: ended, repetitive, distinct",
        ("response/ended", "response/repetition", "response/distinct", "response/most_common"),
        percent=True,
    ),
    Chart("Explained variance", ("value/explained_variance", "q/explained_variance")),
    Chart(
        "Clip fraction",
        ("policy/clip_fraction", "policy/clip_high", "policy/clip_low"),
        percent=True,
    ),
    Chart("Entropy, nats", ("policy/entropy",)),
    Chart("KL of one update, nats per token", ("policy/kl_to_old", "policy/step_kl")),
    Chart("Ratio", ("ratio/max", "ratio/min")),
    Chart("Value and return", ("value/mean", "q/mean", "return/mean")),
    Chart("Advantage before whitening", ("advantage/raw_mean", "advantage/raw_std")),
    Chart("Rewards", ("reward/*",)),
    Chart("Spread of reward", ("reward/std",)),
    Chart("Scores missing or clipped", ("reward/unscored", "reward/clipped"), percent=True),
    Chart("Loss", ("loss", "held_out/loss")),
    Chart("Margin", ("margin",)),
    Chart("Log-probabilities", ("logprobs/*",)),
    Chart("Terms of the loss", ("loss/*",)),
    Chart("Gradient norm", ("grad_norm/*",)),
    Chart(
        "Largest share of one expert",
        ("experts/largest_share", "critic_experts/largest_share"),
        percent=True,
    ),
    Chart("Load-balancing loss", ("experts/balance_loss", "critic_experts/balance_loss")),
    Chart("KL per token, nats", ("kl/token_*",)),
    Chart("Coefficients", ("kl/coef", "policy/beta")),
    Chart("Groups without signal", ("groups_without_signal",), percent=True),
    Chart(
        "Prompts by pass rate",
        ("prompts/unseen", "prompts/hard", "prompts/learnable", "prompts/easy"),
    ),
    Chart("Sampler and learner", ("sampler_mismatch", "ratio/first_error")),
    Chart("Distance to the reference, nats", ("logratio/abs",)),
    Chart("Invariants", ("sampler_ratio", "reference/moved")),
    Chart("Epochs, skipped updates", ("policy/epochs", "skipped")),
    Chart("Staleness", ("staleness/mean", "staleness/max")),
    Chart("Discarded rollouts", ("staleness/thrown_away",), percent=True),
    Chart("Win rate on held-out prompts", ("policy/win_rate",), percent=True),
    Chart("Correlation of advantage and reward", ("advantage/reward_correlation",)),
    Chart("Perplexity on SFT data", ("policy/sft_perplexity",)),
    Chart("Drift of the reward model", ("reward/drift",)),
    Chart("Learning rate", ("lr", "lr/*")),
)
"""The charts in the order of a page. A chart without a metric of the stage is left out."""
APART = {
    "reward/gold",
    "reward/std",
    "reward/unscored",
    "reward/clipped",
    "reward/length_correlation",
    "reward/drift",
}
"""Metrics that match `reward/*` and are not components of the reward."""


ONLY_ABOVE_0 = {"reward/unscored", "reward/clipped"}
"""Metrics that are drawn only where they are above 0 at some step."""


def charts(series: "Series", own: Sequence[Definition] = ()) -> list[tuple[Chart, list[str]]]:
    """Return the charts that a stage has something for, each with the names it draws; the last are
    those of the user's own metrics, and one for each metric that a reward function logs. A pattern
    that stands for one line that is drawn already is left out."""
    shown: set[str] = set()
    result = []
    logged = [name for name in sorted(series.columns) if name.startswith(LOGGED)]
    titles = [sentence(definition(name).label).rstrip(".") for name in logged]
    of_logged = [Chart(title, (name,)) for title, name in zip(titles, logged, strict=True)]
    for chart in (*CHARTS, *own_charts(own), *of_logged):
        names = [name for pattern in chart.metrics for name in _matching(pattern, series)]
        if names and not (set(names) <= shown):
            result.append((chart, names))
            shown |= set(names)
    return result


def own_charts(own: Sequence[Definition]) -> list[Chart]:
    """Return the charts of the user's own metrics: one for each title."""
    titles: dict[str, list[Definition]] = {}
    for row in own:
        titles.setdefault(row.chart or row.label, []).append(row)
    return [
        Chart(title, tuple(row.name for row in rows), rows[0].percent)
        for title, rows in titles.items()
    ]


def _matching(pattern: str, series: "Series") -> list[str]:
    if "*" not in pattern:
        column = series.columns.get(pattern)
        is_shown = column is not None and (
            pattern not in ONLY_ABOVE_0 or any(x > 0 for x in column)
        )
        return [pattern] if is_shown else []
    matches = [
        name
        for name in sorted(series.columns)
        if fnmatch.fnmatchcase(name, pattern) and name not in APART
    ]
    # A component that is the whole reward, or a term that is always 0, says nothing new.
    if matches == ["reward/model"] or (len(matches) == 1 and pattern == "reward/*"):
        return []
    return [
        name
        for name in matches
        if any(x not in {0.0} and not math.isnan(x) for x in series.columns[name])
    ]
