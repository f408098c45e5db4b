"""The verdicts of one library, as text, JSON and a table of several libraries."""

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rl_conformance.claims import Claim, Verdict, judge_all
from rl_conformance.library import Library
from rl_conformance.registry import CLAIMS

SIGNS = {"holds": "✓", "convention": "◇", "fails": "✗", "raises": "!", "not offered": "–"}


@dataclass(frozen=True)
class Report:
    """What was found of one version of one library, on one day."""

    library: str
    version: str
    torch: str
    date: str
    verdicts: tuple[Verdict, ...]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self)) | {"verdicts": [each.as_json() for each in self.verdicts]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        verdicts = tuple(
            Verdict(**each | {"error": float("inf")} if isinstance(each["error"], str) else each)
            for each in values["verdicts"]
        )
        return cls(**values | {"verdicts": verdicts})


def judge_library(library: Library, key: str, part_of_name: str = "") -> Report:
    """Return the report of all claims whose name contains a text."""
    claims = [claim for claim in CLAIMS if part_of_name in claim.name]
    return Report(
        library=library.name,
        version=library.version,
        torch=version("torch"),
        date=datetime.date.today().isoformat(),
        verdicts=tuple(judge_all(claims, library, key)),
    )


def counts(report: Report) -> str:
    """Return how many claims came out how, in words."""
    number = Counter[str](each.outcome for each in report.verdicts)
    return " · ".join(f"{number[outcome]} {outcome}" for outcome in SIGNS if number[outcome])


def by_name() -> dict[str, Claim]:
    return {claim.name: claim for claim in CLAIMS}


def as_text(report: Report) -> str:
    """Return the table of one library, then each claim that does not hold with its numbers."""
    title = f"{report.library} {report.version} (torch {report.torch}, {report.date})"
    lines = [title, counts(report), ""]
    for each in report.verdicts:
        if each.outcome != "not offered":
            error = "" if each.error is None else f"{each.error:.1e}"
            lines.append(
                f"  {SIGNS[each.outcome]} {each.claim:<32} {error:>8}  {each.detail}".rstrip()
            )
    missing = [each.claim for each in report.verdicts if each.outcome == "not offered"]
    if missing:
        lines += ["", f"  – not offered: {', '.join(missing)}"]
    claims = by_name()
    for each in report.verdicts:
        if each.outcome == "fails":
            claim = claims[each.claim]
            lines += ["", f"{each.claim}: {claim.sentence} ({claim.source})"]
            lines += [f"    {line}" for line in each.reproduction.splitlines()]
    return "\n".join([*lines, ""])


def as_markdown(reports: Sequence[Report]) -> str:
    """Return two tables with a column per library: how many claims of each family came out how,
    and each claim, with notes on what its signs refer to."""
    return f"{summary(reports)}\n\n{details(reports)}"


def head(first: str, reports: Sequence[Report]) -> list[str]:
    names = [f"{each.library} {each.version}" for each in reports]
    return [f"| {first} | {' | '.join(names)} |", f"|---|{'---|' * len(reports)}"]


def summary(reports: Sequence[Report]) -> str:
    """Return a table with a row per family of claims, and the date of each report."""
    families = dict.fromkeys(claim.family for claim in CLAIMS)
    lines = head("claims about", reports)
    for family in families:
        cells = [of_family(each, family) for each in reports]
        if any(cells):
            lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| *date* | {' | '.join(each.date for each in reports)} |"])


def of_family(report: Report, family: str) -> str:
    """Return how many claims of a family came out how, by signs; a dash where none is offered."""
    prefix = f"{family}/"
    outcomes = Counter[str](v.outcome for v in report.verdicts if v.claim.startswith(prefix))
    offered = {outcome: number for outcome, number in outcomes.items() if outcome != "not offered"}
    if outcomes and not offered:
        return SIGNS["not offered"]
    return " · ".join(
        f"{offered[outcome]} {SIGNS[outcome]}" for outcome in SIGNS if outcome in offered
    )


def details(reports: Sequence[Report]) -> str:
    lines = head("claim", reports)
    notes: list[str] = []
    of = [{verdict.claim: verdict for verdict in each.verdicts} for each in reports]
    for claim in CLAIMS:
        if not any(claim.name in each for each in of):
            continue
        cells = [cell(each.get(claim.name), notes) for each in of]
        sentence = claim.sentence.replace("|", r"\|")
        lines.append(f"| `{claim.name}` {sentence} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes, ""])


def cell(verdict: Verdict | None, notes: list[str]) -> str:
    """Return the sign of a verdict, with the number of a note that says more."""
    if verdict is None:
        return ""
    sign = SIGNS[verdict.outcome]
    if verdict.outcome in {"holds", "not offered"}:
        return sign
    text = verdict.detail
    if verdict.outcome == "fails":
        error = verdict.error if verdict.error is not None else float("inf")
        size = f"{error:.2g}" if error < float("inf") else "not finite"
        text = f"difference {size}" + (f", {verdict.detail}" if verdict.detail else "")
    known = {note.partition(". ")[2]: number for number, note in enumerate(notes, 1)}
    if text not in known:
        notes.append(f"{len(notes) + 1}. {text}")
    return f"{sign} {known.get(text, len(notes))}"
