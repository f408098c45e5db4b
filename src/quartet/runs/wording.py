"""The numbers of a run in words: those that a stage wrote when it finished."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quartet.runs.definitions import definition, sentence

MEASURES = {
    "reward": "reward (what was trained on)",
    "gold": "gold reward (what was meant)",
    "response/tokens": "tokens per answer",
    "response/ended": "answers that end",
    "response/repetition": "repetition within answers",
    "response/distinct": "answers unlike any other",
}
"""The measures of an evaluation, before and after: labels by name, in the order of a table."""
EMPTY = "(empty)"
"""Stands for a text without a visible character."""
SUMMARIES = {
    "ceiling": "The best possible accuracy, by the gold reward, is {}.",
    "centre": "The mean score, which was subtracted from all scores, is {}.",
    "best_step": "The weights are those of step {}, the best evaluation.",
    "stopped_at": "The stage stopped early, at step {}.",
    "held_out_pairs": "{} pairs are held out.",
    "held_out_lengths": "{} of the held-out pairs have sides of different lengths.",
    "held_out_longer_chosen": "In {} of those, the longer side is the chosen one.",
    "held_out_prefers_longer": "In {} of those, the model prefers the longer side.",
    "held_out_confidence": "The accuracy that the held-out margins claim is {}.",
}
"""Sentences on the numbers of a stage's summary that are no metric of the stage."""
SHARES = {"held_out_longer_chosen", "held_out_prefers_longer"}
ORDER = ["held_out_pairs", "held_out_lengths", "held_out_longer_chosen", "held_out_prefers_longer"]
"""The numbers that speak of one another, in their order; they come last."""


def number(value: Any, digits: int = 3) -> str:
    """Return a value as text; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    text = (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.{digits}g}"
        if abs(value) < 1e6
        else f"{value:.2e}"
    )
    return text.replace("-", "−")


def steps_in_words(stage: str, first: int, last: int | None = None) -> str:
    """Return "step 3" or "steps 3 to 5"; nothing for an evaluation, whose steps are its passes and
    say nothing to a reader."""
    if stage == "evaluation":
        return ""
    return f"steps {first:,} to {last:,}" if (last or 0) > first else f"step {first:,}"


def where(stage: str, first: int, last: int | None = None) -> str:
    """Return the place of what was seen in a stage, from a first step to a last one."""
    words = [stage.replace("_", " "), steps_in_words(stage, first, last)]
    return ", ".join(filter(None, words))


def aligned(values: Sequence[Any]) -> list[str]:
    """Return numbers that stand together as text, with the decimals that give the largest three
    digits: 0.00937 and 1.54 are 0.01 and 1.54. Beyond 0.001 to 10⁶ each is written alone."""
    largest = max((abs(v) for v in values if _is_finite(v)), default=0.0)
    if not 0.001 <= largest < 1e6 or all(isinstance(v, int) or v is None for v in values):
        return [number(v) for v in values]
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return [f"{v:z,.{decimals}f}".replace("-", "−") if _is_finite(v) else number(v) for v in values]


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def stage_summary(summary: Mapping[str, Any] | None) -> list[str]:
    """Return sentences with the numbers that a stage wrote when it finished."""
    numbers = {k: v for k, v in (summary or {}).items() if isinstance(v, int | float)}
    last = [key for key in ORDER if key in numbers]
    sentences = []
    for key in [*(key for key in numbers if key not in last), *last]:
        value = numbers[key]
        if key in SUMMARIES:
            words = f"{value:.0%}" if key in SHARES else number(value)
            sentences.append(SUMMARIES[key].format(words))
        elif not key.startswith("held_out_"):
            sentences.append(f"{sentence(key.replace('_', ' '))[:-1]}: {number(value)}.")
        elif not key.endswith("_before"):
            label = sentence(definition(key.removeprefix("held_out_")).label)[:-1]
            before = numbers.get(f"{key}_before")
            change = f"{number(before)} before, {number(value)} after"
            words = number(value) if before is None else change
            sentences.append(f"{label} on held-out data: {words}.")
    return sentences
