"""Charts of a run as Plotly figures: the same in the studio, the report and a notebook.

Each is a plain dict of `data` and `layout`, which Plotly draws in a page as in Python; colours of
text and background are left to the page.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quartet.runs.definitions import Definition, definition
from quartet.runs.rules import roughness

if TYPE_CHECKING:
    from quartet.runs.reader import Run, Series

Spec = dict[str, Any]

MOST_POINTS = 800
"""The most points of a line; a longer series is drawn as the means of equal pieces."""
SMOOTHING = 0.1
"""The share of the steps that the moving average covers; the raw line is drawn thinly behind."""
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
GREY = "#8a8f98"


@dataclass(frozen=True)
class Chart:
    """Metrics that are drawn in one chart."""

    title: str
    metrics: tuple[str, ...]
    """Names, or patterns such as `loss/*`."""
    percent: bool = False


CHARTS = (
    Chart("Reward", ("reward", "reward/gold")),
    Chart("KL to the reference", ("kl",)),
    Chart("Pair accuracy", ("accuracy", "held_out/accuracy"), percent=True),
    Chart("Response length", ("response/tokens",)),
    Chart("Turns", ("response/turns",)),
    Chart(
        "Ended, repetition, distinct",
        ("response/ended", "response/repetition", "response/distinct", "response/most_common"),
        percent=True,
    ),
    Chart("Explained variance", ("value/explained_variance",)),
    Chart(
        "Clip fraction",
        ("policy/clip_fraction", "policy/clip_high", "policy/clip_low"),
        percent=True,
    ),
    Chart("Entropy", ("policy/entropy",)),
    Chart("KL of one update", ("policy/kl_to_old", "policy/step_kl")),
    Chart("Ratio", ("ratio/max", "ratio/min")),
    Chart("Value and return", ("value/mean", "return/mean")),
    Chart("Advantage before whitening", ("advantage/raw_mean", "advantage/raw_std")),
    Chart("Rewards", ("reward/*",)),
    Chart("Loss", ("loss", "held_out/loss")),
    Chart("Margin", ("margin",)),
    Chart("Log-probabilities", ("logprobs/*",)),
    Chart("Terms of the loss", ("loss/*",)),
    Chart("Gradient norm", ("grad_norm/*",)),
    Chart("KL per token", ("kl/token_*",)),
    Chart("Coefficients", ("kl/coef", "policy/beta")),
    Chart("Groups without signal", ("groups_without_signal",), percent=True),
    Chart("Sampler and learner", ("sampler_mismatch", "ratio/first_error")),
    Chart("Invariants", ("sampler_ratio", "reference/moved", "logratio/abs")),
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
    "reward/length_correlation",
    "reward/drift",
}
"""Metrics that match `reward/*` and are not components of the reward."""


def charts(series: "Series", own: Sequence[Definition] = ()) -> list[tuple[Chart, list[str]]]:
    """Return the charts that a stage has something for, each with the names it draws; the last are
    those of the user's own metrics. A pattern that stands for one line that is drawn already is
    left out."""
    shown: set[str] = set()
    result = []
    for chart in (*CHARTS, *own_charts(own)):
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
        return [pattern] if pattern in series.columns else []
    matches = [
        name for name in series.columns if fnmatch.fnmatchcase(name, pattern) and name not in APART
    ]
    # A component that is the whole reward, or a term that is always 0, says nothing new.
    if matches == ["reward/model"] or (len(matches) == 1 and pattern == "reward/*"):
        return []
    return [
        name
        for name in matches
        if any(x not in {0.0} and not math.isnan(x) for x in series.columns[name])
    ]


def lines(run: "Run", stage: str, title: str, names: Sequence[str], percent: bool = False) -> Spec:
    """Return a chart of metrics over the steps of a stage, with the KL target where there is one
    and a mark at each step with a warning."""
    series = run.series[stage]
    data = []
    for place, name in enumerate(names):
        color = COLORS[place % len(COLORS)]
        label = definition(name, run.definitions).label
        points = [
            (step, v)
            for step, v in zip(series.steps, series.columns[name], strict=True)
            if not math.isnan(v)
        ]
        if len(points) < 0.9 * len(series.steps):  # measured now and then
            steps, values = zip(*points, strict=True) if points else ((), ())
            data.append(_line(steps, values, color, {"name": label, "mode": "lines+markers"}))
            continue
        x, y = thinned(list(series.steps), list(series.columns[name]))
        smooth = smoothed(y)
        if smooth is not None:
            data.append(
                _line(x, y, color, {"opacity": 0.25, "hoverinfo": "skip", "showlegend": False})
            )
        data.append(_line(x, smooth or y, color, {"name": label}))
    spec: Spec = {
        "data": data,
        "layout": layout(title, ".0%" if percent else None, legend=len(names) > 1),
    }
    target = run.config.get("algorithm", {}).get("kl", {}).get("controller", {}).get("target")
    if names[0] == "kl" and target:
        spec["layout"]["shapes"] = [_horizontal(target)]
    marks = sorted({w["step"] for w in run.warnings if w.get("stage") == stage})
    spec["layout"]["annotations"] = [
        {
            "x": step,
            "y": 0,
            "yref": "paper",
            "text": "▲",
            "showarrow": False,
            "font": {"color": "#f59e0b"},
        }
        for step in marks
    ]
    return spec


def phases(run: "Run", stage: str) -> Spec:
    """Return a chart of the seconds of each step by phase."""
    series = run.series[stage]
    data = []
    for place, (name, column) in enumerate(series.phases.items()):
        x, y = thinned(list(series.steps), list(column))
        data.append(_line(x, y, COLORS[place % len(COLORS)], {"stackgroup": "one", "name": name}))
    return {"data": data, "layout": layout("Seconds of a step, by phase", None, legend=True)}


def frontier(run: "Run") -> Spec:
    """Return the chart of scores against √KL, with a point per step, the best-of-n line of the
    initial policy, win rates on held-out prompts, and a mark where the gold reward began to
    fall."""
    stage = run.rl_stage
    data: list[Spec] = []
    spec: Spec = {
        "data": data,
        "layout": layout("Score against distance from the reference", None, legend=True),
    }
    spec["layout"] |= {"xaxis": _axis("√KL, nats"), "yaxis": _axis("mean score"), "height": 480}
    spec["layout"]["legend"]["y"], spec["layout"]["margin"]["b"] = -0.13, 80
    for place, key in enumerate(("reward", "gold")):
        points = [(math.sqrt(p["kl"]), p[key]) for p in run.best_of_n if p.get(key) is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            name = f"best of n by reward: {key}"
            data.append(
                _line(
                    xs,
                    ys,
                    COLORS[place],
                    {"name": name, "line": {"color": COLORS[place], "dash": "dot"}},
                )
            )
    if stage is None or "kl" not in run.series[stage].columns:
        return spec
    series = run.series[stage]
    every = slice(None, None, math.ceil(len(series.steps) / MOST_POINTS))
    distance = [
        math.sqrt(max(kl, 0.0))
        for kl in smoothed(list(series.columns["kl"]), 0.15) or series.columns["kl"]
    ]
    for place, name in enumerate(("reward", "reward/gold")):
        if name not in series.columns:
            continue
        y = smoothed(list(series.columns[name]), 0.15) or list(series.columns[name])
        label = definition(name).label
        marker = {"size": 6, "color": COLORS[place]}
        more = {
            "name": label,
            "mode": "lines+markers",
            "marker": marker,
            "customdata": list(series.steps[every]),
        }
        more["hovertemplate"] = (
            "step %{customdata}: %{y:.3g} at √KL %{x:.3g}<extra>" + label + "</extra>"
        )
        data.append(_line(distance[every], y[every], COLORS[place], more))
    if "policy/win_rate" in series.columns:
        data.append(_win_rates(series, distance))
        title = "win rate on held-out prompts"
        spec["layout"]["yaxis2"] = _axis(title) | {
            "overlaying": "y",
            "side": "right",
            "range": [0, 1.02],
            "tickformat": ".0%",
        }
        spec["layout"]["yaxis2"] |= {
            "showgrid": False,
            "dtick": 0.25,
            "tick0": 0,
            "zeroline": False,
        }
    if (onset := overoptimised(series)) is not None:
        at = list(series.steps).index(onset)
        spec["layout"]["shapes"] = [_vertical(distance[at])]
        words = f"gold is highest at step {onset}; over-optimized after it"
        spec["layout"]["annotations"] = [
            {
                "x": distance[at],
                "y": 1,
                "yref": "paper",
                "text": words,
                "showarrow": False,
                "xanchor": "right",
            }
        ]
    return spec


def _win_rates(series: "Series", distance: Sequence[float]) -> Spec:
    """Return the win rates against the initial policy on held-out prompts as points."""
    places = [i for i, rate in enumerate(series.columns["policy/win_rate"]) if not math.isnan(rate)]
    label = definition("policy/win_rate").label
    more = {
        "name": label,
        "mode": "markers",
        "yaxis": "y2",
        "marker": {"size": 9, "symbol": "diamond", "color": COLORS[2]},
        "customdata": [series.steps[i] for i in places],
        "hovertemplate": "step %{customdata}: wins %{y:.0%} at √KL %{x:.3g}<extra>"
        + label
        + "</extra>",
    }
    return _line(
        [distance[i] for i in places],
        [series.columns["policy/win_rate"][i] for i in places],
        COLORS[2],
        more,
    )


BINS = 8
"""The number of bins of the calibration chart; each has the same number of pairs."""


def calibration(pairs: Sequence[Mapping[str, Any]]) -> Spec:
    """Return the calibration chart of a reward model: for pairs binned by the difference of their
    scores, the predicted probability σ(|difference|) that the higher one is preferred, against the
    share in which it was."""
    ranked = sorted(
        (abs(p["chosen_score"] - p["rejected_score"]), p["chosen_score"] > p["rejected_score"])
        for p in pairs
    )
    size = max(1, math.ceil(len(ranked) / BINS))
    pieces = [ranked[i : i + size] for i in range(0, len(ranked), size)]
    predicted = [sum(1 / (1 + math.exp(-d)) for d, _ in piece) / len(piece) for piece in pieces]
    observed = [sum(right for _, right in piece) / len(piece) for piece in pieces]
    margin = [
        f"differences of {piece[0][0]:.2g} to {piece[-1][0]:.2g}, {len(piece)} pairs"
        for piece in pieces
    ]
    data = [
        _line(
            [0.5, 1.0],
            [0.5, 1.0],
            GREY,
            {"name": "calibrated", "line": {"color": GREY, "dash": "dash", "width": 1}},
        ),
        _line(
            predicted,
            observed,
            COLORS[0],
            {
                "mode": "lines+markers",
                "name": "reward model",
                "text": margin,
                "hovertemplate": "%{text}",
            },
        ),
    ]
    spec: Spec = {"data": data, "layout": layout("Calibration", ".0%", legend=True)}
    spec["layout"] |= {
        "xaxis": _axis("predicted probability") | {"tickformat": ".0%"},
        "yaxis": _axis("share that was right") | {"tickformat": ".0%"},
    }
    spec["layout"] |= {"height": 340, "hovermode": "closest"}
    spec["layout"]["margin"]["b"], spec["layout"]["legend"]["y"] = 70, -0.2
    return spec


def score_histogram(pairs: Sequence[Mapping[str, Any]]) -> Spec:
    """Return histograms of the scores of chosen and rejected responses."""
    data: list[Spec] = [
        {
            "type": "histogram",
            "x": [p[f"{side}_score"] for p in pairs],
            "name": side,
            "opacity": 0.6,
            "marker": {"color": color},
        }
        for side, color in (("chosen", COLORS[0]), ("rejected", COLORS[1]))
    ]
    spec: Spec = {"data": data, "layout": layout("Scores", None, legend=True)}
    spec["layout"] |= {"barmode": "overlay", "height": 340, "xaxis": _axis("score")}
    spec["layout"]["margin"]["b"], spec["layout"]["legend"]["y"] = 70, -0.2
    return spec


def overoptimised(series: "Series") -> int | None:
    """Return the step at which over-optimization begins, or None: the maximum of the smoothed gold
    reward, if gold ends lower by more than a tenth of what it had gained while reward ends
    higher."""
    if not {"reward", "reward/gold"} <= series.columns.keys() or len(series.steps) < 10:
        return None
    gold = smoothed(list(series.columns["reward/gold"]), 0.2) or []
    reward = smoothed(list(series.columns["reward"]), 0.2) or []
    if not gold or not reward:
        return None
    begun = len(gold) // 5  # before, a smoothed value is the mean of hardly any
    top = max(range(begun, len(gold)), key=gold.__getitem__)
    gained, lost = gold[top] - gold[begun], gold[top] - gold[-1]
    noise = 6 * roughness(list(series.columns["reward/gold"])) / math.sqrt(0.2 * len(gold))
    return (
        series.steps[top]
        if lost > max(0.1 * gained, noise, 0.01) and reward[-1] > reward[top]
        else None
    )


def figure(run: "Run", name: str, stage: str | None = None) -> Any:
    """Return a Plotly figure: "frontier", "phases", or a metric by its name."""
    import plotly.graph_objects as go

    from quartet.runs.reader import NoRun

    if name == "frontier":
        return go.Figure(frontier(run))
    stage = stage or next(
        (s for s, series in run.series.items() if name in series.columns), run.main_stage
    )
    if stage is None or stage not in run.series:
        raise NoRun(f"{run.name}: has no stage {stage}. It has {', '.join(run.series) or 'none'}.")
    if name == "phases":
        return go.Figure(phases(run, stage))
    if name not in run.series[stage].columns:
        raise NoRun(
            f"{run.name}: {stage} has no metric {name}. It has "
            f"{', '.join(sorted(run.series[stage].columns))}."
        )
    return go.Figure(lines(run, stage, definition(name, run.definitions).label, [name]))


# --- drawing


def thinned(x: Sequence[int], y: Sequence[float]) -> tuple[list[int], list[float | None]]:
    """Return at most MOST_POINTS points, the means of equal pieces; None where there is no
    number."""
    size = math.ceil(len(x) / MOST_POINTS) if x else 1
    if size == 1:
        return list(x), finite(y)
    pieces = [[v for v in finite(y[i : i + size]) if v is not None] for i in range(0, len(y), size)]
    return list(x[size - 1 :: size]) + ([x[-1]] if len(x) % size else []), [
        sum(p) / len(p) if p else None for p in pieces
    ]


def finite(values: Sequence[Any]) -> list[Any]:
    """Return the values with None for NaN and infinity, which JSON cannot hold."""
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]


def smoothed(y: Sequence[float | None], share: float = SMOOTHING) -> list[float] | None:
    """Return the exponential moving average over a share of the points, without bias to 0 at its
    start. None for fewer than 12 points or where a number is missing. A constant series is returned
    unchanged, to the bit."""
    if len(y) >= 12 and len(set(y)) == 1 and y[0] is not None:
        return [v for v in y if v is not None]
    if len(y) < 12 or any(v is None or not math.isfinite(v) for v in y):
        return None
    keep = 1 - 1 / max(share * len(y), 1.5)
    total = weight = 0.0
    means = []
    for v in y:
        total, weight = keep * total + (1 - keep) * (v or 0.0), keep * weight + 1 - keep
        means.append(total / weight)
    return means


def layout(title: str, tickformat: str | None = None, legend: bool = False) -> Spec:
    return {
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 14}},
        "margin": {"l": 48, "r": 12, "t": 38, "b": 48 if legend else 32},
        "height": 240,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": -0.14,
            "yanchor": "top",
            "xanchor": "left",
            "font": {"size": 11},
        },
        "hovermode": "x unified",
        "xaxis": _axis(None),
        "yaxis": _axis(None) | ({"tickformat": tickformat} if tickformat else {}),
        "font": {"family": "system-ui, sans-serif", "size": 12},
    }


def _axis(title: str | None) -> Spec:
    axis: Spec = {
        "gridcolor": "rgba(128,128,128,0.18)",
        "zerolinecolor": "rgba(128,128,128,0.35)",
        "automargin": True,
    }
    return axis | ({"title": {"text": title}} if title else {})


def _line(x: Sequence[Any], y: Sequence[Any], color: str, more: Mapping[str, Any]) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": finite(x),
        "y": finite(y),
        "line": {"color": color, "width": 2},
        **more,
    }


DASHED = {"color": GREY, "dash": "dash", "width": 1}


def _horizontal(y: float) -> Spec:
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": DASHED}


def _vertical(x: float) -> Spec:
    return {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "x0": x, "x1": x, "line": DASHED}
