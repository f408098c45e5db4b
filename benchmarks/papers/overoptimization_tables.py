"""What overoptimization.py fits, prints and draws."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import paper

from quartet.runs.history import moving_means

Row = dict[str, Any]
Step = dict[str, float]
FORMS = ("bon", "rl")
WIDTH = 3
"""KL and true reward of a PPO run, a few answers each step, are means of so many steps."""
NAMES = ("kl", "reward", "gold")
DISTANCES = (2.0, 4.0, 6.0, 8.0, 10.0)
"""KL, in nats, at which kinds of runs are compared."""


@dataclass(frozen=True)
class Law:
    """A fit of the gain in true reward over d = √KL."""

    alpha: float
    beta: float
    r2: float

    @classmethod
    def fitted(cls, d: Sequence[float], gain: Sequence[float], form: str) -> "Law":
        """Fit d (α − β d) for "bon", d (α − β log d) for "rl", by least squares over d > 0."""
        x, y = (np.array(values)[np.array(d) > 0] for values in (d, gain))
        bend = x * x if form == "bon" else x * np.log(x)
        (alpha, minus_beta), *_ = np.linalg.lstsq(np.stack([x, bend], 1), y, rcond=None)
        rest = y - alpha * x - minus_beta * bend
        spread = float(((y - y.mean()) ** 2).sum())
        return cls(float(alpha), float(-minus_beta), 1 - float((rest**2).sum()) / spread)

    def __str__(self) -> str:
        return number(self.alpha) + ", " + number(self.beta)


def number(value: float, digits: int = 2) -> str:
    return paper.minus(f"{value:.{digits}f}")


def mean_gain(row: Row) -> list[float]:
    """Return the mean over seeds of the gain by best-of-n, by n."""
    return [statistics.fmean(gains) for gains in zip(*row["gains"], strict=True)]


# --- best-of-n


def distinct(rows: Sequence[Row], *names: str) -> list[Any]:
    """Return what the rows have under these names, each once, in their order."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def matrix(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Return a table of the reward models: rows by width and flipped labels, columns by number of
    comparisons. `cell` returns the text for a kind of reward model."""
    texts = {(r["width"], r["flipped"], r["comparisons"]): cell(r) for r in rows}
    counts = [count for (count,) in distinct(rows, "comparisons")]
    lines = [
        [str(width), f"{flipped:.0%}", *(texts.get((width, flipped, n), "–") for n in counts)]
        for width, flipped in distinct(rows, "width", "flipped")
    ]
    return paper.table(["width", "flipped", *(f"{count:,}" for count in counts)], lines)


def gain_cell(row: Row) -> str:
    return paper.pm([gain[-1] for gain in row["gains"]])


def ensemble_cell(row: Row) -> str:
    return " / ".join(number(gain[-1]) for gain in row["ensemble"].values())


def law_cell(row: Row) -> str:
    """Return α, β and R² of the form for best-of-n, R² of the other, and the best n."""
    gain = mean_gain(row)
    bon, rl = (Law.fitted(row["d"], gain, form) for form in FORMS)
    best = 2 ** max(range(len(gain)), key=lambda i: gain[i])
    return f"{bon}; {number(bon.r2, 3)} / {number(rl.r2, 3)}; {best}"


def members_cells(row: Row) -> list[str]:
    """Return a row of the table of ensembles that share comparisons, and that do not."""
    kind = [str(row["width"]), f"{row['comparisons']:,}", f"{row['flipped']:.0%}"]
    cells = [paper.pm([gain[-1] for gain in row["single"]])]
    for name in ("same", "own"):
        for way in row[name][0]:
            cells.append(paper.pm([gains[way][-1] for gains in row[name]]))
    return kind + cells


# --- PPO


def kind_of(row: Row) -> list[str]:
    return [f"{row['comparisons']:,}", f"{row['coef']:g}", f"{row['lr']:.0e}".replace("e-0", "e-")]


def smoothed(run: Sequence[Step]) -> list[Step]:
    """Return the means of each `WIDTH` neighbouring steps."""
    means = [moving_means([step[name] for step in run], WIDTH) for name in NAMES]
    return [dict(zip(NAMES, step, strict=True)) for step in zip(*means, strict=True)]


def points(runs: Sequence[Sequence[Step]], start: float) -> tuple[list[float], list[float]]:
    """Return d and the gain of every step."""
    d = [math.sqrt(max(step["kl"], 0.0)) for run in runs for step in run]
    return d, [step["gold"] - start for run in runs for step in run]


def ppo_cells(row: Row, start: float) -> list[str]:
    """Return a row of the table of PPO."""
    runs = [smoothed(run) for run in row["runs"]]
    best = [max(run, key=lambda step: step["gold"]) for run in runs]
    ends = [run[-1] for run in runs]
    together = {form: Law.fitted(*points(row["runs"], start), form) for form in FORMS}
    apart = {
        form: [Law.fitted(*points([run], start), form).r2 for run in row["runs"]] for form in FORMS
    }
    return [
        *kind_of(row),
        str(len(row["runs"][0])),
        paper.pm([step["gold"] - start for step in best]),
        paper.pm([step["kl"] for step in best]),
        paper.pm([step["gold"] - start for step in ends]),
        paper.pm([step["kl"] for step in ends]),
        str(together["rl"]),
        " / ".join(number(together[form].r2) for form in reversed(FORMS)),
        " / ".join(number(statistics.median(apart[form])) for form in reversed(FORMS)),
    ]


def first_at(run: Sequence[Step], kl: float) -> Step | None:
    """Return a run where its KL first reaches a value, between two steps by a straight line; None
    where it does not."""
    for before, after in pairwise(run):
        if before["kl"] < kl <= after["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return None


def frontier(results: Row) -> Iterator[list[str]]:
    """Yield the gain where the KL is first so large: of best-of-n by the reward model of the
    last kind of PPO run, and of each kind of PPO run."""
    for row in results["best_of_n"]:
        if row["flipped"] or judge_of(row) != judge_of(results["ppo"][-1]):
            continue
        runs = [
            [{"kl": d * d, "gold": gain} for d, gain in zip(row["d"], gains, strict=True)]
            for gains in row["gains"]
        ]
        yield [f"{row['comparisons']:,}", "best-of-n", "–", *at_distances(runs, 0.0)]
    for row in results["ppo"]:
        yield [*kind_of(row), *at_distances(map(smoothed, row["runs"]), results["start"])]


def judge_of(row: Row) -> tuple[int, int]:
    """Return width and comparisons of the reward model."""
    return row["width"], row["comparisons"]


def at_distances(runs: Iterable[Sequence[Step]], start: float) -> Iterator[str]:
    """Yield the gain at each distance, with the number of runs that reach it where some do not."""
    runs = list(runs)
    for kl in DISTANCES:
        gains = [step["gold"] - start for run in runs if (step := first_at(run, kl))]
        some = f" ({len(gains)})" if len(gains) < len(runs) else ""
        yield paper.pm(gains) + some if gains else "–"


def at_equal_kl(results: Row) -> Iterator[list[str]]:
    """Yield, for each kind of run with a penalty and each kind without one that has the same reward
    model, what the end of a run with a penalty has more than the other: in gain and in learned
    reward where the other's KL first is the same, and in gain where that one's is highest."""
    rows, start = results["ppo"], results["start"]
    for row, other in itertools.product(rows, rows):
        if not row["coef"] or other["coef"] or judge_of(other) != judge_of(row):
            continue
        ends = [smoothed(run)[-1] for run in row["runs"]]
        others = [smoothed(run) for run in other["runs"]]
        pairs = [
            (end, step)
            for run, end in zip(others, ends, strict=True)
            if (step := first_at(run, end["kl"]))
        ]
        learned, true = ([a[name] - b[name] for a, b in pairs] for name in ("reward", "gold"))
        highest = [max(step["gold"] for step in run) for run in others]
        equal = ["–"] * 4
        if pairs:
            equal = [
                paper.pm([step["gold"] - start for _, step in pairs]),
                paper.interval(true),
                ", ".join(map(number, true)),
                paper.interval(learned),
            ]
        yield [
            *kind_of(row)[1:],
            kind_of(other)[2],
            paper.pm([end["kl"] for end in ends]),
            paper.pm([end["gold"] - start for end in ends]),
            *equal,
            paper.interval([e["gold"] - h for e, h in zip(ends, highest, strict=True)]),
        ]


# --- everything


def tables(results: Row) -> str:
    """Return the tables of docs/papers/overoptimization.md, with empty lines between them."""
    ways = ["mean", "mean − deviation", "worst"]
    members = ["width", "comparisons", "flipped", "single"]
    members += [f"{name}: {way}" for name in ("same", "own") for way in ways]
    kind = ["comparisons", "`kl.coef`", "lr"]
    ppo = [*kind, "steps", "highest gain", "its KL", "gain at the end", "KL at the end", "α, β"]
    ppo += ["R², all steps", "R², single runs"]
    equal = ["`kl.coef`", "lr", "lr without", "KL", "gain", "gain without", "difference", "by seed"]
    equal += ["in learned reward", "less highest gain without"]
    start, models = results["start"], results["best_of_n"]
    return "\n".join(
        [
            matrix(models, gain_cell),
            matrix(models, lambda row: paper.pm(row["accuracy"])),
            matrix(models, law_cell),
            matrix(models, ensemble_cell),
            paper.table(members, map(members_cells, results["members"])),
            paper.table(ppo, (ppo_cells(row, start) for row in results["ppo"])),
            paper.table([*kind, *(f"KL {kl:g}" for kl in DISTANCES)], frontier(results)),
            paper.table(equal, at_equal_kl(results)),
        ]
    )


def figure(results: Row) -> Any:
    """Return the gain in true reward over √KL: best-of-n by number of comparisons above, PPO by
    kind below."""
    from plotly.subplots import make_subplots

    models, kinds = results["best_of_n"], results["ppo"]
    widths = [width for (width,) in distinct(models, "width")]
    counts = [count for (count,) in distinct(models, "comparisons")]
    columns = max(len(counts), len(kinds))
    titles = [f"best-of-n, {count:,} comparisons" for count in counts]
    titles += [""] * (columns - len(counts)) + [ppo_title(row) for row in kinds]
    drawn = make_subplots(2, columns, subplot_titles=titles, vertical_spacing=0.16)
    named = set()
    for row in models:
        name = f"width {row['width']}" + f", {row['flipped']:.0%} flipped" * bool(row["flipped"])
        drawn.add_scatter(
            x=row["d"],
            y=mean_gain(row),
            name=name,
            line={
                "color": paper.COLORS[widths.index(row["width"])],
                "dash": "dot" if row["flipped"] else "solid",
            },
            mode="lines",
            showlegend=name not in named,
            row=1,
            col=counts.index(row["comparisons"]) + 1,
        )
        named.add(name)
    for place, row in enumerate(kinds):
        for seed, run in enumerate(row["runs"]):
            d, gain = points([smoothed(run)], results["start"])
            drawn.add_scatter(
                x=d,
                y=gain,
                line={"color": paper.COLORS[seed], "width": 1.2},
                mode="lines",
                showlegend=False,
                row=2,
                col=place + 1,
            )
    drawn.update_xaxes(title_text="√KL", title_standoff=4)
    drawn.update_xaxes(range=[0, 2.2], row=1)
    drawn.update_xaxes(range=[0, 10], row=2)
    drawn.update_yaxes(range=[-0.2, 1.8], row=1)
    drawn.update_yaxes(range=[-2, 1.6], row=2)
    drawn.update_yaxes(title_text="gain in true reward", col=1)
    drawn.update_layout(margin={"l": 60, "r": 20, "t": 50, "b": 50})
    return drawn


def ppo_title(row: Row) -> str:
    comparisons, coef, lr = kind_of(row)
    return f"PPO, {comparisons} comparisons,<br>kl.coef {coef}, lr {lr}"
