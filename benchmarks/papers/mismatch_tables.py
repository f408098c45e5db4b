"""What mismatch.py prints and draws: how the runs ended, and when the doctor spoke."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import paper

from quartet.runs.history import moving_means

Row = dict[str, Any]
TOLERANCES = ("fp32", "engine")
FALLEN = 0.25
"""The gold reward has fallen where the mean of `WIDTH` steps is this much below its maximum."""
WIDTH = 5
SHOWN = (
    ("none", "none", 0.01),
    ("fresh, σ 2", "none", 0.01),
    ("top-p 0.9", "none", 0.01),
    ("8 updates late", "none", 0.01),
    ("none", "none", 0.0),
    ("fresh, σ 2", "none", 0.0),
    ("8 updates late", "none", 0.0),
    ("8 updates late", "truncated", 0.0),
)
"""The kinds, corrections and penalties in the figure."""


def chosen(rows: Sequence[Row], **key: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if key.items() <= row.items()]


def distinct(rows: Sequence[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return what the rows have under these names, each once, in their order."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def pm(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}".replace("-", "−")


def mean_course(rows: Sequence[Row]) -> list[float]:
    """Return the mean over runs of the gold reward on held-out prompts, by test."""
    return [statistics.fmean(each) for each in zip(*(row["held_out"] for row in rows), strict=True)]


def collapse(held_out: Sequence[float], clean: Sequence[float], every: int) -> int | None:
    """Return the step of the first test from which on the policy has less than half of what runs
    without mismatch have at the same step; None where it has more at the last one."""
    below = [own < other / 2 for own, other in zip(held_out, clean, strict=True)]
    if not below[-1]:
        return None
    first = len(below) - below[::-1].index(False) if False in below else 0
    return first * every


def fall(gold: Sequence[float]) -> int | None:
    """Return the last step of the first `WIDTH` from which on their mean stays more than `FALLEN`
    below the highest mean before; None where it does not."""
    means = moving_means(gold, WIDTH)
    tops = accumulate(means, max)
    below = [top - mean > FALLEN for top, mean in zip(tops, means, strict=True)]
    if not below[-1]:
        return None
    return len(below) - below[::-1].index(False) + WIDTH


def groups(results: Row) -> Iterator[tuple[Row, list[Row]]]:
    """Yield, for each way to run `sums`, what its runs have in common, and the runs: those with a
    penalty and few steps first."""
    names = ("kind", "correction", "coef", "steps")
    ways = distinct(results["sums"], *names)
    for way in sorted(ways, key=lambda way: (way[3], -way[2])):
        key = dict(zip(names, way, strict=True))
        yield key, chosen(results["sums"], **key)


def kinds(results: Row) -> Iterator[list[str]]:
    """Yield, for each kind of mismatch and each correction, how the policy ended on `sums`."""
    for key, runs in groups(results):
        collapsed = [step for step in collapses(results, key, runs) if step is not None]
        yield [
            *cells_of(key),
            f"`{key['correction']}`",
            ratio([run["ratio"][0] for run in runs]),
            ratio([run["ratio"][-1] for run in runs]),
            pm([statistics.fmean(run["reward"][-WIDTH:]) for run in runs]),
            pm([run["held_out"][-1] for run in runs]),
            f"{len(collapsed)} of {len(runs)}",
        ]


def cells_of(key: Row) -> list[str]:
    return [key["kind"], f"{key['coef']:g}", str(key["steps"])]


def collapses(results: Row, key: Row, runs: Sequence[Row]) -> list[int | None]:
    """Return the step at which each run of a group has collapsed."""
    alike = {"kind": "none", "coef": key["coef"], "steps": key["steps"]}
    clean = mean_course(chosen(results["sums"], **alike))
    every = results["settings"]["sums"]["every"]
    return [collapse(run["held_out"], clean, every) for run in runs]


def ratio(values: Sequence[float]) -> str:
    """Return the median of sampler ratios: single ones are thousands."""
    median = statistics.median(values)
    if median < 1.1:
        return f"{median:.3f}"
    if median < 10:
        return f"{median:.2f}"
    return f"{median:.0f}" if median < 1e4 else f"{median:.0e}".replace("e+0", "e")


def doctor(results: Row) -> Iterator[list[str]]:
    """Yield, for each kind of mismatch without a correction, when rules first spoke."""
    for key, runs in groups(results):
        if key["correction"] == "none":
            spoke = [steps_of([run["spoke"][name] for run in runs]) for name in TOLERANCES]
            found = collapses(results, key, runs)
            yield [*cells_of(key), *spoke, listed(found) if any(found) else "–"]


def steps_of(runs: Sequence[dict[str, int]]) -> str:
    """Return the rules that spoke in any run, each with the steps by run, the earliest first."""
    rules = sorted(
        {rule for run in runs for rule in run},
        key=lambda rule: min(run[rule] for run in runs if rule in run),
    )
    return (
        ", ".join(f"`{rule}` ({listed([run.get(rule) for run in runs])})" for rule in rules)
        or "silent"
    )


def listed(steps: Sequence[int | None]) -> str:
    """Return steps by run; those that are all the same once."""
    if len(set(steps)) == 1 and len(steps) > 1:
        return f"{steps[0]} in all"
    return ", ".join("–" if step is None else str(step) for step in steps)


def judged(results: Row) -> Iterator[list[str]]:
    """Yield, for each judge and penalty on `reviews`, how the gold reward went and when rules first
    spoke."""
    rows = results["reviews"]
    for judge, coef in distinct(rows, "judge", "coef"):
        runs = chosen(rows, judge=judge, coef=coef)
        yield [
            judge,
            f"{coef:g}",
            pm([max(moving_means(run["gold"], WIDTH)) for run in runs]),
            pm([statistics.fmean(run["gold"][-WIDTH:]) for run in runs]),
            pm([run["kl"][-1] for run in runs], 0),
            listed([fall(run["gold"]) for run in runs]).replace("None in all", "–"),
            steps_of([run["spoke"]["fp32"] for run in runs]),
        ]


def tables(results: Row) -> str:
    """Return the tables of docs/papers/mismatch.md, with empty lines between them."""
    way = ["mismatch", "`kl.coef`", "steps"]
    ended = [*way, "correction", "sampler ratio, step 1", "last step", "sampler's exact"]
    ended += ["policy's exact", "collapsed"]
    spoke = [*way, "rules, own sampler in fp32", "rules, as an engine", "collapse at step"]
    judge = ["judge", "`kl.coef`", "highest gold", "gold at the end", "KL", "gold falls at step"]
    return "\n".join(
        [
            paper.table(ended, kinds(results)),
            paper.table(spoke, doctor(results)),
            paper.table([*judge, "rules (at step, by seed)"], judged(results)),
        ]
    )


def figure(results: Row) -> Any:
    """Return how kinds of mismatch learn, how they end by size, and judges with a bias."""
    from plotly.subplots import make_subplots

    titles = ("sums: mean over seeds", "sums: each run at its end, no correction", "reviews")
    drawn = make_subplots(1, 3, subplot_titles=titles)
    rows, every = results["sums"], results["settings"]["sums"]["every"]
    for (kind, correction, coef), color in zip(SHOWN, paper.COLORS, strict=True):
        runs = chosen(rows, kind=kind, correction=correction, coef=coef, steps=40)
        if not runs:
            continue
        name = kind if correction == "none" else f"{kind}, {correction}"
        name += "" if coef else ", no penalty"
        course, style = mean_course(runs), {"color": color, "dash": "solid" if coef else "dash"}
        x = [every * test for test in range(len(course))]
        drawn.add_scatter(x=x, y=course, name=name, line=style, mode="lines", row=1, col=1)
    families = list(dict.fromkeys(kind.split(",")[0] for (kind,) in distinct(rows, "kind")))
    for place, family in enumerate(families):
        runs = [
            run
            for run in chosen(rows, correction="none", coef=0.01, steps=40)
            if run["kind"].split(",")[0] == family
        ]
        drawn.add_scatter(
            x=[max(statistics.fmean(run["ratio"]) - 1, 1e-7) for run in runs],
            y=[run["held_out"][-1] for run in runs],
            name=family,
            mode="markers",
            marker={"color": paper.COLORS[place % 8], "symbol": ("circle", "x")[place // 8]},
            legend="legend2",
            row=1,
            col=2,
        )
    for place, (judge, coef) in enumerate(distinct(results["reviews"], "judge", "coef")):
        for number, run in enumerate(chosen(results["reviews"], judge=judge, coef=coef)):
            drawn.add_scatter(
                x=list(range(1, len(run["gold"]) + 1)),
                y=run["gold"],
                name=f"{judge}, kl.coef {coef:g}",
                line={"color": paper.COLORS[place], "width": 1.2},
                mode="lines",
                showlegend=number == 0,
                legend="legend3",
                row=1,
                col=3,
            )
    return arranged(drawn)


def arranged(drawn: Any) -> Any:
    """Return the figure with axes and legends in place."""
    drawn.update_xaxes(title_text="step", col=1)
    drawn.update_xaxes(title_text="mean sampler ratio − 1", type="log", col=2)
    drawn.update_xaxes(title_text="step", col=3)
    drawn.update_yaxes(title_text="exact answers, held out", range=[0, 1], col=1)
    drawn.update_yaxes(range=[0, 1], col=2)
    drawn.update_yaxes(title_text="gold reward", range=[-4, 2], col=3)
    below = {"orientation": "v", "y": -0.2, "yanchor": "top", "font": {"size": 10}}
    drawn.update_layout(
        margin={"t": 40, "r": 20, "b": 230},
        legend=below | {"x": 0.0},
        legend2=below | {"x": 0.36},
        legend3=below | {"x": 0.73},
    )
    return drawn
