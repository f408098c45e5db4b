"""Charts of a critic's audit as Plotly figures: calibration, error by position, advantages by λ."""

from collections.abc import Sequence
from typing import Any

from quartet.runs.critic_audits import Audit, place
from quartet.runs.figures import COLORS, DASHED, GREY, Spec, axis, layout, stroke

CAPTIONS = (
    (
        "Calibration",
        "States are grouped by V. Each point is a group: the mean of V, and the mean return of "
        "continuations from its states. On the dashed line the critic is right; above it, V is too "
        "low, below it, too high.",
    ),
    (
        "Error by position",
        "The bias is V less the mean return; it is 0 where the critic is right on average. The RMS "
        "error is that of single states. The noise of the Monte Carlo means is subtracted from it.",
    ),
    (
        "Advantage estimates by λ",
        "The bias is the distance of the mean estimate from the Monte Carlo advantage, the "
        "standard deviation that of single estimates, and the error is both together. The best λ "
        "has the lowest error.",
    ),
)
"""The title of each chart, and what it shows."""


def audit_figures(audit: Audit) -> list[dict[str, Any]]:
    """Return the charts of an audit, each with its caption."""
    specs = [_calibration(audit), _positions(audit), _lambdas(audit)]
    return [
        {"figure": spec, "meanings": [{"label": title, "text": caption}]}
        for spec, (title, caption) in zip(specs, CAPTIONS, strict=True)
        if spec["data"]
    ]


def _calibration(audit: Audit) -> Spec:
    bins = audit["calibration"]["bins"]
    ends = [
        number
        for row in bins
        for number in (row["value"], row["mean_return"]["value"])
        if number is not None
    ]
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [min(ends), max(ends)],
        "y": [min(ends), max(ends)],
        "name": "calibrated",
        "line": DASHED,
        "hoverinfo": "skip",
    }
    points = _points(
        [row["value"] for row in bins], [row["mean_return"] for row in bins], "mean return", 0
    )
    points["text"] = [
        f"V from {row['low']:.3g} to {row['high']:.3g}, {row['states']} states" for row in bins
    ]
    points["hovertemplate"] = "%{text}: mean return %{y:.3g}<extra></extra>"
    spec: Spec = {"data": [diagonal, points], "layout": layout(CAPTIONS[0][0], None, legend=True)}
    spec["layout"] |= {
        "xaxis": axis("V"),
        "yaxis": axis("mean return"),
        "height": 340,
        "hovermode": "closest",
    }
    return spec


def _positions(audit: Audit) -> Spec:
    rows = audit["positions"]
    names = [place(row["first"], row["last"]) for row in rows]
    data = [
        _points(names, [row["bias"] for row in rows], "bias: V less mean return", 0),
        _points(names, [row["rmse"] for row in rows], "RMS error of V", 1),
    ]
    spec: Spec = {"data": data, "layout": layout(CAPTIONS[1][0], None, legend=True)}
    spec["layout"] |= {"height": 340, "hovermode": "closest", "yaxis": axis("return")}
    spec["layout"]["xaxis"] = axis("place in the answer") | {"type": "category"}
    return spec


def _lambdas(audit: Audit) -> Spec:
    rows = audit["advantages"]["by_lam"]
    names = [f"{row['lam']:g}" for row in rows]
    data = [
        _points(names, [row["error"] for row in rows], "error", 0),
        _points(names, [row["bias"] for row in rows], "bias", 1),
        _line(names, [row["deviation"] for row in rows], "standard deviation", 2),
    ]
    spec: Spec = {
        "data": data if rows else [],
        "layout": layout(CAPTIONS[2][0], None, legend=True),
    }
    spec["layout"] |= {"height": 340, "hovermode": "closest", "yaxis": axis("advantage")}
    spec["layout"]["xaxis"] = axis("λ") | {"type": "category"}
    true = audit["advantages"]["true_deviation"]
    if rows and true is not None:
        spec["data"].append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": names,
                "y": [true] * len(names),
                "name": "sd of true advantages",
                "line": {"color": GREY, "dash": "dash", "width": 1},
            }
        )
    return spec


def _line(x: Sequence[Any], y: Sequence[Any], name: str, place: int) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": stroke(place),
    }


def _points(x: Sequence[Any], estimates: Sequence[Any], name: str, place: int) -> Spec:
    """Return a line with the intervals of its points."""
    line = _line(x, [e["value"] for e in estimates], name, place)
    high = [0.0 if e["high"] is None else e["high"] - e["value"] for e in estimates]
    low = [0.0 if e["low"] is None else e["value"] - e["low"] for e in estimates]
    bars = {"type": "data", "symmetric": False, "array": high, "arrayminus": low}
    return {**line, "error_y": {**bars, "color": COLORS[place], "thickness": 1}}
