"""A sweep as a table and as Plotly figures: the same in the studio and in a terminal."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from quartet.runs.figures import COLORS, DASHED, GREY, PERCENT, Spec, axis, layout
from quartet.runs.sweeps import Sweep, Trial
from quartet.runs.wording import number

GOOD, BAD = (29, 158, 117), (217, 119, 6)
"""The colours of the best and of the worst trial, red, green and blue."""
DISTANCES = {"held_out_kl": "KL on held-out prompts, nats", "kl": "KL while training, nats"}
"""What the frontier's horizontal axis can be, the first that was recorded."""


def value_text(value: Any) -> str:
    """Return the value of a searched key as text."""
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def objective_text(trial: Trial) -> str:
    """Return a trial's objective with its deviation over seeds, such as 0.91 ± 0.04."""
    if trial.state != "done" or trial.deviation is None:
        return number(trial.mean if trial.state == "done" else None)
    return f"{number(trial.mean)} ± {number(trial.deviation)}"


def in_words(trial: Trial) -> str:
    """Return the values of a trial: epsilon 0.2 · optim.lr 1e-05."""
    return " · ".join(f"{name} {value_text(value)}" for name, value in trial.values.items())


def sweep_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row for each trial, the best first and those without an objective last: `trial`,
    `values`, `objective`, `measures` (of the bounds and the KL), `state`, `note`."""
    ranked = sweep.ranked()
    rest = [trial for trial in sweep.trials.values() if trial not in ranked]
    best, names = sweep.best, measure_names(sweep)
    return [
        {
            "trial": trial,
            "values": [value_text(trial.values.get(key)) for key in sweep.keys],
            "objective": objective_text(trial),
            "measures": [number(trial.measure(name)) for name in names],
            "state": "best" if trial is best else trial.state,
            "note": _note(trial),
        }
        for trial in [*ranked, *rest]
    ]


def measure_names(sweep: Sweep) -> list[str]:
    """Return the measures that are shown beside the objective: those with a bound, and the KL."""
    distance = distance_name(sweep)
    names = list(sweep.facts.get("at_most", {}))
    return names + ([distance] if distance and distance not in names else [])


def _note(trial: Trial) -> str:
    if trial.state == "done" and not trial.is_allowed:
        over = [name for name, excess in trial.violations.items() if excess > 0]
        return "; ".join(f"{name} > {number(trial.at_most[name])}" for name in over)
    return trial.reason


def distance_name(sweep: Sweep) -> str | None:
    """Return the measure of distance that trials have; None where they have none."""
    trials = sweep.trials.values()
    return next((n for n in DISTANCES if any(t.measure(n) is not None for t in trials)), None)


# --- charts


def sweep_figures(sweep: Sweep) -> list[Spec]:
    """Return the charts that the trials so far allow."""
    figures = [parallel_coordinates(sweep), importance(sweep), frontier(sweep)]
    return [figure for figure in figures if figure["data"]]


def parallel_coordinates(sweep: Sweep) -> Spec:
    """Return a chart with an axis for each searched key and one for the objective, and a line for
    each trial in a colour between the worst and the best. Lines of trials without an objective are
    dashed and end before its axis."""
    trials = list(sweep.trials.values())
    ranked = sweep.ranked()
    names = [*sweep.keys, sweep.objective]
    axes = [_Axis([t.values.get(key) for t in trials]) for key in sweep.keys]
    axes.append(_Axis([t.mean for t in ranked]))
    data = []
    for trial in trials:
        means = [trial.mean] if trial in ranked else []
        y = [a.place(v) for a, v in zip(axes, [*_values(sweep, trial), *means], strict=False)]
        share = axes[-1].place(trial.mean if means else None) or 0.0
        best = share if sweep.facts["direction"] == "maximize" else 1 - share
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(y))),
                "y": y,
                "name": f"trial {trial.number}",
                "text": [escape(_point(sweep, trial, place)) for place in range(len(y))],
                "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
                "line": _line(best) if means else {**DASHED, "width": 1.5},
                "opacity": 0.9 if means else 0.6,
            }
        )
    spec: Spec = {"data": data, "layout": layout("Trials", None)}
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_short(n) for n in names]}
    spec["layout"] |= {
        "xaxis": axis(None) | ticks | {"range": [-0.3, len(names) - 0.7]},
        "yaxis": axis(None) | {"visible": False, "range": [-0.12, 1.12]},
        "hovermode": "closest",
        "height": 380,
        "annotations": [note for place, a in enumerate(axes) for note in a.ends(place)],
    }
    return spec


def importance(sweep: Sweep) -> Spec:
    """Return a chart of the share of the objective's variance that each key explains, with what a
    key without effect would explain, and the share that is between seeds."""
    shares = sweep.importance()
    data: list[Spec] = []
    spec: Spec = {"data": data, "layout": layout("Share of variance explained", None, legend=True)}
    if not shares:
        return spec
    rows: list[tuple[str, float, float | None]] = [
        (_short(name), share, chance) for name, (share, chance) in shares.items()
    ]
    if sweep.noise is not None and len(sweep.facts["seeds"]) > 1:
        rows.append(("between seeds", sweep.noise, None))
    labels, values, chances = zip(*reversed(rows), strict=True)
    bar = {"type": "bar", "orientation": "h", "marker": {"color": COLORS[0]}, "width": 0.6}
    data.append({**bar, "x": list(values), "y": list(labels), "name": "explained"})
    known = [(c, label) for c, label in zip(chances, labels, strict=True) if c is not None]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [chance for chance, _ in known],
            "y": [label for _, label in known],
            "name": "without any effect, on average",
            "marker": {"symbol": "line-ns-open", "size": 34, "color": COLORS[1]},
        }
    )
    spec["layout"] |= {
        "xaxis": axis(None) | {"range": [0, 1.02], "tickformat": PERCENT},
        "height": 150 + 44 * len(rows),
        "hovermode": "closest",
    }
    return spec


def frontier(sweep: Sweep) -> Spec:
    """Return a chart of the objective against the KL, a point per trial with its deviation over
    seeds, and a line through the trials that no other one beats in both."""
    distance = distance_name(sweep)
    data: list[Spec] = []
    spec: Spec = {"data": data, "layout": layout("Objective against KL", None, legend=True)}
    points = [(t.measure(distance), t) for t in sweep.ranked()] if distance else []
    placed = sorted(((x, t) for x, t in points if x is not None), key=lambda point: point[0])
    if not placed or distance is None:
        return spec
    for name, color, rows in (
        ("trials", COLORS[0], [p for p in placed if p[1] is not sweep.best]),
        ("best", COLORS[2], [p for p in placed if p[1] is sweep.best]),
    ):
        if rows:
            data.append(_points(name, color, rows))
    line = unbeaten(placed, sweep.facts["direction"] == "maximize")
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _ in line],
            "y": [t.mean for _, t in line],
            "name": "not beaten in both",
            "line": {"color": GREY, "dash": "dot", "width": 1.5},
            "hoverinfo": "skip",
        }
    )
    bound = sweep.facts.get("at_most", {}).get(distance)
    edge = {"type": "line", "x0": bound, "x1": bound, "y0": 0, "y1": 1, "yref": "paper"}
    spec["layout"] |= {
        "xaxis": axis(DISTANCES[distance]),
        "yaxis": axis(escape(sweep.objective)),
        "height": 420,
        "hovermode": "closest",
        "shapes": [] if bound is None else [{**edge, "line": DASHED}],
    }
    return spec


def unbeaten(points: Sequence[tuple[float, Trial]], maximize: bool) -> list[tuple[float, Trial]]:
    """Return the points, ordered by distance, that no nearer one equals or beats."""
    found: list[tuple[float, Trial]] = []
    for x, trial in points:
        last = found[-1][1].mean if found else None
        mean = trial.mean or 0.0
        if last is None or (mean > last if maximize else mean < last):
            found.append((x, trial))
    return found


def _points(name: str, color: str, rows: Sequence[tuple[float, Trial]]) -> Spec:
    deviations = [trial.deviation or 0.0 for _, trial in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in rows],
        "y": [trial.mean for _, trial in rows],
        "error_y": {"type": "data", "array": deviations, "color": color, "thickness": 1},
        "text": [escape(f"trial {t.number}: {in_words(t)}") for _, t in rows],
        "name": name,
        "marker": {"color": color, "size": 9},
        "hovertemplate": "%{text}<br>%{y:.3g} at %{x:.3g}<extra></extra>",
    }


class _Axis:
    """Where values stand on one axis, from 0 to 1: numbers in proportion (by their logarithm where
    all are positive and one is ten times another), anything else in order."""

    def __init__(self, values: Sequence[Any]) -> None:
        present = [value for value in values if value is not None]
        self.numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
        if self.numeric:
            self.order: list[Any] = sorted(set(present))
        else:
            texts = {value_text(value): value for value in present}
            self.order = [texts[text] for text in sorted(texts)]
        low, high = (self.order[0], self.order[-1]) if self.order else (0, 0)
        self.log = self.numeric and bool(present) and low > 0 and high >= 10 * low

    def place(self, value: Any) -> float | None:
        """Return where a value stands; None for none."""
        if value is None:
            return None
        if len(self.order) < 2:
            return 0.5
        if not self.numeric:
            texts = [value_text(each) for each in self.order]
            return texts.index(value_text(value)) / (len(texts) - 1)
        low, high, x = (math.log(v) if self.log else v for v in (*self._ends(), value))
        return float((x - low) / (high - low))

    def ends(self, place: int) -> list[Spec]:
        """Return the smallest and the largest value as notes at the ends of the axis."""
        if not self.order:
            return []
        notes = {0.0: self.order[0], 1.0: self.order[-1]}
        if len(self.order) == 1:
            notes = {0.5: self.order[0]}
        shift = {0.0: ("top", -6), 1.0: ("bottom", 6), 0.5: ("bottom", 6)}
        return [
            {
                "x": place,
                "y": y,
                "text": escape(value_text(value)[:14]),
                "showarrow": False,
                "yanchor": shift[y][0],
                "yshift": shift[y][1],
                "font": {"size": 11},
            }
            for y, value in notes.items()
        ]

    def _ends(self) -> tuple[float, float]:
        return float(self.order[0]), float(self.order[-1])


def _values(sweep: Sweep, trial: Trial) -> list[Any]:
    return [trial.values.get(key) for key in sweep.keys]


def _point(sweep: Sweep, trial: Trial, place: int) -> str:
    """Return what is said when a point of a trial's line is pointed at."""
    if place == len(sweep.keys):
        return f"{sweep.objective} {objective_text(trial)} ({in_words(trial)})"
    return f"{sweep.keys[place]} {value_text(trial.values.get(sweep.keys[place]))}"


def _line(share: float) -> Spec:
    mixed = (round(b + share * (g - b)) for g, b in zip(GOOD, BAD, strict=True))
    return {"color": "rgb({}, {}, {})".format(*mixed), "width": 2}


def _short(name: str) -> str:
    """Return the last two parts of a dotted key, without markup."""
    return escape(".".join(name.split(".")[-2:]))
