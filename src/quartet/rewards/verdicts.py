"""What a judge's text says: a score, or which of two answers is better."""

import re

from quartet.labels.log import Verdict
from quartet.rewards.protocol import Score

VERDICT = re.compile(r"(?<![a-z])(score|better)[*_`]*[ \t]*:([^\n]*)", re.IGNORECASE | re.ASCII)
NUMBER = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,9}))?", re.ASCII)
SHARES = {"a": 1.0, "tie": 0.5, "b": 0.0}
"""What the first answer of a pair wins by each verdict."""


def parse_score(text: str, low: float, high: float) -> Score:
    """Return the number N of the last "Score: N" in a judge's text, None where it is no number
    between `low` and `high`. Behind N may stand "/" and the highest score; nothing else but marks
    of bold type and a full stop. "Score: 8,5", "Score: 11" of 10 and "Score: 8 or 9" are no
    scores."""
    match = NUMBER.fullmatch(_verdict(text, "score"))
    if match is None or (match[2] is not None and float(match[2]) != high):
        return None
    score = float(match[1])
    return score if low <= score <= high else None


def parse_preference(text: str) -> float | None:
    """Return 1 for a last "Better: A" in a judge's text, 0 for B, 0.5 for tie, None for anything
    else."""
    return SHARES.get(_verdict(text, "better").lower())


def reconciled(straight: float | None, swapped: float | None) -> Verdict:
    """Return the verdict about a pair from the shares that its first answer in the prompt won: 1, 0
    or 0.5 for a tie, with answer a first and with answer b first."""
    if straight is None or swapped is None:
        return "skip"
    if straight == swapped or 0.5 in (straight, swapped):
        return "tie"
    return "a" if straight > swapped else "b"


def _verdict(text: str, word: str) -> str:
    """What the last line with `word:` says behind it, without marks of bold type and a full
    stop."""
    lines = [match[2] for match in VERDICT.finditer(text) if match[1].lower() == word]
    return lines[-1].strip("*_` \t\r").removesuffix(".").strip("*_` \t\r") if lines else ""
