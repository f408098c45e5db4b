"""Tables of runs, rollouts and tokens for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from quartet.runs.untrusted import printable

if TYPE_CHECKING:
    from quartet.runs.reader import Sample

COLUMNS = {
    "reward": 2,
    "value": 2,
    "advantage": 2,
    "ratio": 3,
    "kl": 2,
    "td_error": 2,
    "return": 2,
    "entropy": 2,
}
COLUMNS |= {"logprob": 2, "ref_logprob": 2}
"""Columns with their decimals, the most important first; as many are shown as fit the screen."""
TOKEN_WIDTH, NUMBER_WIDTH, CASE_WIDTH = 18, 10, 60


def shown(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def decimal(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def token_rows(sample: Mapping[str, Sequence[Any]], cases: Sequence[str], width: int) -> Table:
    """Return a table with a row per response token, coloured by its advantage, and one row for the
    prompt. A wide screen has a phrase on what the update did; a narrow one has an arrow, and an x
    where the clip stopped the update."""
    wordy = width >= TOKEN_WIDTH + NUMBER_WIDTH * len(COLUMNS) + CASE_WIDTH
    room = (width - TOKEN_WIDTH - (CASE_WIDTH if wordy else 4)) // NUMBER_WIDTH
    columns = [c for c in COLUMNS if any(v is not None for v in sample[c])][: max(room, 1)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("token", no_wrap=True, overflow="ellipsis", max_width=TOKEN_WIDTH)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("what the update did" if wordy else "", overflow="fold")
    begin = (
        sample["is_response"].index(True) if True in sample["is_response"] else len(sample["text"])
    )
    prompt = Text(printable("".join(sample["text"][:begin])), style="dim")
    table.add_row(prompt, *[""] * len(columns), "given" if wordy else "")
    largest = max((abs(a) for a in sample["advantage"] if a is not None), default=0.0) or 1.0
    for i in range(begin, len(sample["text"])):
        if not sample["is_response"][i]:  # what an environment said
            table.add_row(
                Text(printable(sample["text"][i]), style="dim"),
                *[""] * len(columns),
                "given" if wordy else "",
            )
            continue
        advantage, clipped = sample["advantage"][i] or 0.0, bool(sample["clipped"][i])
        color = "blue" if advantage > 0 else "yellow" if advantage < 0 else "default"
        token = Text(
            printable(sample["text"][i]) or "∅",
            style=f"bold {color}" if abs(advantage) > 0.5 * largest else color,
        )
        numbers = [decimal(sample[name][i], COLUMNS[name]) for name in columns]
        arrow = ("x" if clipped else "") + ("↑" if advantage > 0 else "↓" if advantage < 0 else "")
        table.add_row(
            token, *numbers, Text(cases[i] if wordy else arrow, style="red" if clipped else "dim")
        )
    return table


def sample_table(samples: "Sequence[Sample]", step: int) -> Table:
    """Return a table of a step's rollouts, the highest score first."""
    table = Table(
        title=f"step {step}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for header in ("sample", "score", "tokens", "KL"):
        table.add_column(header, justify="right", no_wrap=True, min_width=6)
    table.add_column("response", no_wrap=True, overflow="ellipsis", ratio=1)
    for s in sorted(samples, key=lambda s: -s.score):
        table.add_row(
            str(s.number), shown(s.score), str(s.tokens), shown(s.kl), printable(s.response)
        )
    return table


def run_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("run", "status", "at", "last numbers"):
        table.add_column(header, overflow="fold")
    for row in rows:
        numbers = "  ".join(f"{label} {value}" for label, value, _ in row["numbers"])
        warnings = f" ▲{row['warnings']}" if row["warnings"] else ""
        at = "" if row["step"] is None else f"{row['stage'] or ''} {row['step']}"
        table.add_row(row["name"], row["status"] + warnings, at, numbers)
    return table


def comparison(
    title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name, overflow="fold")
    for label, values in rows:
        table.add_row(printable(label), *(printable(str(value)) for value in values))
    return table
