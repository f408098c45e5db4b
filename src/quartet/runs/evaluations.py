"""Results of `quartet eval`: read from a run folder, as tables and as the chart of scores against
KL."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter

from quartet.runs.figures import Spec, axis, layout, stroke
from quartet.runs.records import Finite, Name, Record
from quartet.runs.untrusted import MAX_DOCUMENT, Folder, Unreadable, checked, parse_json
from quartet.runs.wording import number

FOLDER = "evaluation"
OTHERS = {"final.json", "best_of_n.json"}
"""What the evaluation stage writes into the same folder."""
MOST = 50
"""The most evaluations of a run that are read."""
DIFFERENCES = {"mean, difference": "mean_difference", "characters, difference": "length_difference"}
"""The columns of differences between two policies, and their keys in a comparison."""
LABELS = {"kl": "KL, nats", "tokens": "tokens per answer"}

COLUMNS = LABELS | {"gold": "gold reward"}
"""The names of measures in a table, where they differ from their own."""
Table = tuple[str, list[str], list[tuple[str, list[str]]]]
"""A title, the names of columns, and rows: a label with a text per column."""


class EstimateRecord(Record):
    value: Finite
    low: Finite | None
    high: Finite | None


class CellRecord(Record):
    policy: Name
    set: Name
    measure: Name
    n: int
    missing: int = 0
    value: Finite | None
    low: Finite | None
    high: Finite | None


class ComparisonRecord(Record):
    policy: Name
    against: Name
    set: Name
    measure: Name
    n: int
    wins: int
    losses: int
    ties: int
    win_rate: EstimateRecord
    length_controlled: EstimateRecord | None = None
    mean_difference: EstimateRecord | None = None
    length_difference: EstimateRecord | None = None
    p: Finite
    p_holm: Finite


class ResultRecord(Record):
    policies: list[Name]
    cells: list[CellRecord]
    comparisons: list[ComparisonRecord] = Field(default_factory=list)


RESULT = TypeAdapter(ResultRecord)


def evaluations(run: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the results of a run's evaluations by name, and a sentence about each file that cannot
    be read."""
    folder, results, problems = Folder(run), {}, []
    try:
        names = sorted(n for n in folder.names(FOLDER) if n.endswith(".json") and n not in OTHERS)
    except Unreadable as error:
        return {}, [f"{FOLDER} {error}"]
    for name in names[:MOST]:
        try:
            content = folder.read(f"{FOLDER}/{name}", MAX_DOCUMENT)
            value, faults = checked(RESULT, parse_json(content or b"")[0])
        except Unreadable as error:
            problems.append(f"{FOLDER}/{name} {error}")
            continue
        problems += [f"{FOLDER}/{name}: {fault}" for fault in faults]
        if value is not None:
            results[name.removesuffix(".json")] = {"comparisons": [], **value}
    if len(names) > MOST:
        problems.append(f"{FOLDER}: only {MOST} of {len(names):,} evaluations are read.")
    return results, problems


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of an evaluation: the measures, and the comparisons where there are any."""
    cells = result["cells"]
    columns = list(dict.fromkeys(cell["measure"] for cell in cells))
    columns.sort(key="tokens".__eq__)
    several = len({cell["set"] for cell in cells}) > 1
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name in dict.fromkeys(cell["set"] for cell in cells):
        for policy in result["policies"]:
            own = [c for c in cells if (c["set"], c["policy"]) == (name, policy)]
            if own:
                rows[name, policy] = {c["measure"]: estimate(c, c.get("missing", 0)) for c in own}
    table: Table = (
        "The mean, with its 95% interval in brackets.",
        [COLUMNS.get(column, column) for column in columns],
        [
            (f"{name} · {policy}" if several else policy, [row.get(c, "–") for c in columns])
            for (name, policy), row in rows.items()
        ],
    )
    if not result["comparisons"]:
        return [table]
    return [table, comparison_table(result["comparisons"])]


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of paired comparisons."""
    columns = ["win rate", "at equal length", "won–tied–lost", "p", "p, Holm", *DIFFERENCES]
    several = len({each["set"] for each in comparisons}) > 1
    rows = []
    for each in comparisons:
        where = f"{each['set']} · " if several else ""
        measure = COLUMNS.get(each["measure"], each["measure"])
        label = f"{where}{each['policy']} against {each['against']}, {measure}"
        counts = f"{each['wins']}–{each['ties']}–{each['losses']}"
        same_length = estimate(each.get("length_controlled"))
        p_values = [probability(each["p"]), probability(each["p_holm"])]
        differences = [estimate(each.get(key)) for key in DIFFERENCES.values()]
        texts = [estimate(each["win_rate"]), same_length, counts, *p_values, *differences]
        rows.append((label, texts))
    return "Two policies on the same rows; a tie is half a win.", columns, rows


def estimate(numbers: Mapping[str, Any] | None, missing: int = 0) -> str:
    """Return an estimate as text, such as 0.61 [0.58, 0.64]; without an interval 0.61."""
    if numbers is None or numbers["value"] is None:
        return "–"
    value, low, high = (numbers[key] for key in ("value", "low", "high"))
    has_interval = low is not None and high is not None
    interval = f" [{number(low)}, {number(high)}]" if has_interval else ""
    return f"{number(value)}{interval}" + (f", {missing} missing" if missing else "")


def probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def kl_frontier(result: Mapping[str, Any]) -> Spec | None:
    """Return the chart of each measure against √KL to the policy compared with, a point per policy;
    None where no KL was measured."""
    distance = {
        (cell["set"], cell["policy"]): math.sqrt(max(cell["value"], 0.0))
        for cell in result["cells"]
        if cell["measure"] == "kl" and cell["value"] is not None
    }
    if not distance:
        return None
    against = result.get("against")
    distance |= {(name, against): 0.0 for name, _ in list(distance) if isinstance(against, str)}
    lines: dict[tuple[str, str], list[tuple[float, float, float, str]]] = {}
    for cell in result["cells"]:
        place = cell["set"], cell["policy"]
        if place in distance and cell["value"] is not None and cell["measure"] not in LABELS:
            half = cell["high"] - cell["value"] if cell["high"] is not None else 0.0
            point = distance[place], cell["value"], half, cell["policy"]
            lines.setdefault((cell["set"], cell["measure"]), []).append(point)
    data = []
    for which, ((name, measure), points) in enumerate(lines.items()):
        x, y, half, policies = zip(*sorted(points), strict=True)
        line = stroke(which)
        data.append(
            {
                "x": list(x),
                "y": list(y),
                "error_y": {
                    "type": "data",
                    "array": list(half),
                    "color": line["color"],
                    "thickness": 1,
                },
                "text": [escape(policy) for policy in policies],
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(f"{measure}, {name}"),
                "line": line,
                "hovertemplate": "%{text}: %{y:.3g} at √KL %{x:.3g}<extra></extra>",
            }
        )
    shape = layout("Score against distance", None, legend=True)
    shape |= {"xaxis": axis("√KL, nats"), "yaxis": axis("mean score"), "height": 480}
    return {"data": data, "layout": shape}
