"""Charts of a run as Plotly figures: the same in the studio, the report and a notebook.

Each is a plain dict of `data` and `layout`, which Plotly draws in a page as in Python; colours of
text and background are left to the page.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quartet.io.texts import did_you_mean
from quartet.runs.definitions import Definition, definition
from quartet.runs.history import roughness

if TYPE_CHECKING:
    from quartet.runs.reader import Run, Series

Spec = dict[str, Any]

LOGARITHMIC = {"ratio/max", "ratio/min"}
"""Metrics with a logarithmic axis: ratios of 2 and ½ are equally far from 1."""
SCORES = {"reward": "reward", "gold": "reward/gold"}
"""The scores of a best-of-n curve, and the metrics that are the same."""
PERCENT = "~%"
"""The format of an axis of shares. A fixed number of digits would write 0.5% and 1% as the same."""
WIN_RATE_AXIS = {
    "overlaying": "y",
    "side": "right",
    "range": [0, 1.02],
    "tickformat": PERCENT,
    "showgrid": False,
    "dtick": 0.25,
    "tick0": 0,
    "zeroline": False,
}
MOST_POINTS = 800
"""The most points of a line; a longer series is drawn as the means of equal pieces."""
SMOOTHING = 0.1
"""The share of the steps that the moving average covers; the raw line is drawn thinly behind."""
COLORS = ("#3b82f6", "#d97706", "#059669", "#ef4444", "#8b5cf6", "#0d9488", "#ec4899", "#65a30d")
GREY = "#808690"
"""Each has a contrast of at least 3 to the background of a light and of a dark page."""
DASHES = ("solid", "solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
"""Lines of a chart differ by more than colour from the third on: who cannot tell red from green
sees green as grey, and red as orange."""


def lines(
    run: "Run",
    stage: str,
    title: str,
    names: Sequence[str],
    percent: bool = False,
    smooth: bool = True,
) -> Spec:
    """Return a chart of metrics over the steps of a stage, with the KL target where there is one
    and a mark at each step with a warning. With `smooth`, moving averages are drawn before the thin
    lines of the values if `can_smooth` allows it."""
    series = run.series[stage]
    smooth = smooth and can_smooth(series, names, run.definitions)
    data = []
    for place, name in enumerate(names):
        label = definition(name, run.definitions).label
        points = _points(series, name)
        if _sparse(series, points):
            steps, values = zip(*points, strict=True) if points else ((), ())
            data.append(_drawn(steps, values, place, {"name": label, "mode": "lines+markers"}))
            continue
        x, y = thinned(list(series.steps), list(series.columns[name]))
        if smooth:
            behind = {"opacity": 0.25, "hoverinfo": "skip", "showlegend": False}
            data.append(_drawn(x, y, place, behind))
        means = smoothed(y) if smooth else None
        data.append(_drawn(x, means or y, place, {"name": label}))
    spec: Spec = {
        "data": data,
        "layout": layout(title, PERCENT if percent else None, legend=len(names) > 1),
    }
    spec["layout"]["xaxis"] = _step_axis(series.steps)
    drawn = [v for name in names for _, v in _points(series, name)]
    spec["layout"]["yaxis"] |= _value_range(drawn, percent)
    if set(names) <= LOGARITHMIC:
        spec["layout"]["yaxis"] |= {"type": "log", "tickformat": "~g"}
    target = run.config.get("algorithm", {}).get("kl", {}).get("controller", {}).get("target")
    if names[0] == "kl" and target:
        spec["layout"]["shapes"] = [_horizontal(target)]
    spec["layout"]["annotations"] = _warning_marks(run, stage)
    return spec


def _value_range(values: Sequence[float], percent: bool) -> Spec:
    """Return what the axis of values needs. Shares are drawn from 0, so that a small share looks
    small, and not beyond 1. A constant is drawn from 0 too: Plotly would show it ± 1."""
    if percent and all(0 <= v <= 1 for v in values):
        return {
            "rangemode": "tozero",
            "autorangeoptions": {"clipmin": -0.02, "clipmax": 1.02},
        }
    return {"rangemode": "tozero"} if len(set(values)) == 1 else {}


def can_smooth(series: "Series", names: Sequence[str], own: Sequence[Definition] = ()) -> bool:
    """Whether all of these metrics may be drawn as moving averages: none is exact, and each has a
    number at (nearly) every step of at least 12. A chart is smoothed as a whole or not at all, so
    that its lines can be compared."""
    return all(
        not definition(name, own).exact
        and not _sparse(series, _points(series, name))
        and smoothed(thinned(list(series.steps), list(series.columns[name]))[1]) is not None
        for name in names
    )


def _points(series: "Series", name: str) -> list[tuple[int, float]]:
    pairs = zip(series.steps, series.columns[name], strict=True)
    return [(step, value) for step, value in pairs if not math.isnan(value)]


def _sparse(series: "Series", points: Sequence[tuple[int, float]]) -> bool:
    """Whether a metric is measured only now and then."""
    return len(points) < 0.9 * len(series.steps)


def phases(run: "Run", stage: str) -> Spec:
    """Return a chart of the seconds of each step by phase."""
    series = run.series[stage]
    data = []
    for place, (name, column) in enumerate(series.phases.items()):
        x, y = thinned(list(series.steps), list(column))
        data.append(_line(x, y, COLORS[place % len(COLORS)], {"stackgroup": "one", "name": name}))
    spec: Spec = {"data": data, "layout": layout("Seconds of a step, by phase", legend=True)}
    spec["layout"]["xaxis"] = _step_axis(series.steps)
    return spec


def frontier(run: "Run", stage: str | None = None) -> Spec:
    """Return the chart of scores against √KL, with a point per step, the best-of-n line of the
    initial policy, win rates on held-out prompts, and a mark where the gold reward began to fall.
    `stage` is an RL stage, of several the last if it is None."""
    stage = stage or run.rl_stage
    look = layout("Score against distance from the reference", None, legend=True)
    look |= {"xaxis": axis("√KL, nats"), "yaxis": axis("mean score"), "height": 480}
    data = list(_best_of_n_lines(run))
    if stage is None or "kl" not in run.series[stage].columns:
        return {"data": data, "layout": look}
    series = run.series[stage]
    distance = [math.sqrt(max(kl, 0.0)) for kl in _course(series, "kl")]
    for name, color in zip(SCORES.values(), COLORS, strict=False):
        if name in series.columns:
            data.append(_scores_line(series, name, distance, color))
    line = next((line for line in data if len(line.get("customdata", ())) > 1), None)
    if line is not None:
        line |= _ends(line["customdata"])
    if "policy/win_rate" in series.columns:
        data.append(_win_rates(series, distance))
        look["yaxis2"] = axis("win rate on held-out prompts") | WIN_RATE_AXIS
    if (onset := overoptimised(series)) is not None:
        at = distance[list(series.steps).index(onset)]
        look["shapes"] = [_vertical(at)]
        look["annotations"] = [
            {
                "x": at,
                "y": 1,
                "yref": "paper",
                "text": "highest gold reward",
                "showarrow": False,
                "xanchor": "right" if 2 * at > max(distance) else "left",
            }
        ]
    return {"data": data, "layout": look}


def _course(series: "Series", name: str) -> list[float]:
    """Return the values of a metric, smoothed where there are enough of them."""
    values = list(series.columns[name])
    return list(smoothed(values, 0.15) or values)


def _best_of_n_lines(run: "Run") -> Iterator[Spec]:
    """Yield the best-of-n line of the initial policy for each score that it was computed with."""
    for (key, metric), color in zip(SCORES.items(), COLORS, strict=False):
        points = [(math.sqrt(p["kl"]), p[key]) for p in run.best_of_n if p.get(key) is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            name = f"{definition(metric).label} of best of n"
            yield _line(xs, ys, color, {"name": name, "line": {"color": color, "dash": "dot"}})


def _scores_line(series: "Series", name: str, distance: Sequence[float], color: str) -> Spec:
    """Return the line of a score against √KL, with a marker for each step, or some of many."""
    every = slice(None, None, math.ceil(len(series.steps) / MOST_POINTS))
    label = definition(name).label
    hover = f"step %{{customdata}}: %{{y:.3g}} at √KL %{{x:.3g}}<extra>{label}</extra>"
    more = {
        "name": label,
        "mode": "lines+markers",
        "marker": {"size": 6, "color": color},
        "customdata": list(series.steps[every]),
        "hovertemplate": hover,
    }
    return _line(distance[every], _course(series, name)[every], color, more)


def _ends(steps: Sequence[int]) -> Spec:
    """Return what names the first and the last step of a line, which say which way it goes."""
    texts = [f"step {steps[0]}", *[""] * (len(steps) - 2), f"step {steps[-1]}"]
    # Below the first step, from which a line rises.
    places = ["bottom right", *["top center"] * (len(steps) - 1)]
    return {"mode": "lines+markers+text", "text": texts, "textposition": places}


def _win_rates(series: "Series", distance: Sequence[float]) -> Spec:
    """Return the win rates against the initial policy on held-out prompts as points. A step's win
    rate is measured after its update, its KL on rollouts sampled before it: the policy that the win
    rate is of has the KL of the next step. After the last step there is none, and the last KL
    stands in for it."""
    places = [i for i, rate in enumerate(series.columns["policy/win_rate"]) if not math.isnan(rate)]
    label = definition("policy/win_rate").label
    more = {
        "name": label,
        "mode": "markers",
        "yaxis": "y2",
        "marker": {"size": 9, "symbol": "diamond", "color": COLORS[2]},
        "customdata": [series.steps[i] for i in places],
        "cliponaxis": False,  # a marker at 0% or 100% is drawn whole
        "hovertemplate": "after step %{customdata}: wins %{y:.0%} at √KL %{x:.3g}<extra>"
        + label
        + "</extra>",
    }
    return _line(
        [distance[min(i + 1, len(distance) - 1)] for i in places],
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
    spec: Spec = {"data": data, "layout": layout("Calibration", PERCENT, legend=True)}
    spec["layout"] |= {
        "xaxis": axis("predicted probability") | {"tickformat": PERCENT},
        "yaxis": axis("share that was right") | {"tickformat": PERCENT},
    }
    spec["layout"] |= {"height": 340, "hovermode": "closest"}
    return spec


def score_histogram(pairs: Sequence[Mapping[str, Any]]) -> Spec:
    """Return histograms of the scores of chosen and rejected responses."""
    data: list[Spec] = [
        {
            "type": "histogram",
            "bingroup": "scores",  # both in the same bins, or their heights could not be compared
            "x": [p[f"{side}_score"] for p in pairs],
            "name": side,
            "opacity": 0.6,
            "marker": {"color": color},
        }
        for side, color in (("chosen", COLORS[0]), ("rejected", COLORS[1]))
    ]
    spec: Spec = {"data": data, "layout": layout("Scores", None, legend=True)}
    spec["layout"] |= {
        "barmode": "overlay",
        "height": 340,
        "xaxis": axis("score"),
        "yaxis": axis("responses"),
    }
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
        return go.Figure(frontier(run, stage))
    stage = stage or next(
        (s for s, series in run.series.items() if name in series.columns), run.main_stage
    )
    if stage is None or stage not in run.series:
        raise NoRun(f"{run.name}: has no stage {stage}. It has {', '.join(run.series) or 'none'}.")
    if name == "phases":
        return go.Figure(phases(run, stage))
    if name not in run.series[stage].columns:
        raise NoRun(
            f"{run.name}: {stage} has no metric {name}."
            f"{did_you_mean(name, run.series[stage].columns)} It has "
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
        "margin": {"l": 48, "r": 12, "t": 38, "b": 32},
        "height": 270 if legend else 250,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": legend,
        # At the bottom of the figure, whose margin grows with it: below the axis and its title.
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "font": {"size": 11},
        },
        "hovermode": "x unified",
        "xaxis": axis(None),
        "yaxis": axis(None) | ({"tickformat": tickformat} if tickformat else {}),
        "font": {"family": "system-ui, sans-serif", "size": 12},
    }


def axis(title: str | None) -> Spec:
    axis: Spec = {
        "gridcolor": "rgba(128,128,128,0.18)",
        "zerolinecolor": "rgba(128,128,128,0.35)",
        "automargin": True,
        "ticklabelstandoff": 4,  # apart from the other axis, whose labels are near in the corner
        "exponentformat": "power",
    }
    return axis | ({"title": {"text": title, "standoff": 8}} if title else {})


def _step_axis(steps: Sequence[int]) -> Spec:
    """Return an axis of steps, with a tick at each where there are few."""
    few = bool(steps) and steps[-1] - steps[0] <= 8
    return axis("step") | ({"dtick": 1} if few else {"tickformat": ",d"})


def _warning_marks(run: "Run", stage: str) -> list[Spec]:
    """Return a ▲ for each step with a warning, with the sentences of its warnings."""
    sentences: dict[int, list[str]] = {}
    for warning in run.warnings:
        if warning.get("stage") == stage:
            sentences.setdefault(warning["step"], []).append(warning["sentence"])
    mark = {"text": "▲", "showarrow": False, "font": {"color": COLORS[1]}, "y": 0, "yref": "paper"}
    return [
        mark | {"x": step, "hovertext": f"step {step}: {_hover_text(' '.join(sentences[step]))}"}
        for step in sorted(sentences)
    ]


HOVER_WIDTH = 60
"""The most characters of a line of a hover label."""


def _hover_text(text: str) -> str:
    """Return a text for a hover label: in lines, and without tags, which Plotly would read."""
    lines = textwrap.wrap(text[: 10 * HOVER_WIDTH], HOVER_WIDTH)
    return "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;") for line in lines)


FEW_POINTS = 8
"""The most points of a line that are marked. Of a single point, no line is to be seen."""


def _drawn(x: Sequence[Any], y: Sequence[Any], place: int, more: Mapping[str, Any]) -> Spec:
    stroked = stroke(place)
    return _line(x, y, stroked["color"], {"line": stroked, **more})


def stroke(place: int) -> Spec:
    """Return how the line of a place in a chart is drawn."""
    return {
        "color": COLORS[place % len(COLORS)],
        "dash": DASHES[place % len(DASHES)],
        "width": 2,
    }


def _line(x: Sequence[Any], y: Sequence[Any], color: str, more: Mapping[str, Any]) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= FEW_POINTS else "lines",
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
