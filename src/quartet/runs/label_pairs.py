"""Pairs to be labelled, from what a run's policies answered."""

import math
import random
from collections.abc import Sequence
from typing import Literal, get_args

from quartet.labels.pairs import Pair, distinct
from quartet.runs.reader import DamagedRun, NoRun, Run
from quartet.runs.rollouts import Sample

Source = Literal["evaluation", "rollouts", "best-of-n"]
SOURCES: tuple[str, ...] = get_args(Source)
STEPS_READ = 20
"""How many of the last recorded steps pairs are taken from."""


def run_pairs(run: Run, source: str | None = None, seed: int = 0) -> list[Pair]:
    """Return pairs of different answers to the same prompt.

    `evaluation`: the trained policy's answer and the first policy's, of the stage evaluation.
    `rollouts`: two of the policy's own answers, of one group or of different steps. `best-of-n`:
    in each group of rollouts, the answer with the highest score and a random other. None takes the
    evaluation where there is one. Raises `NoRun` where there is no such pair.
    """
    if source is None:
        source = "evaluation" if next(iter(run.answers()), None) is not None else "rollouts"
    pairs = distinct(_evaluation(run) if source == "evaluation" else _rollouts(run, source, seed))
    if not pairs:
        others = ", ".join(name for name in SOURCES if name != source)
        raise NoRun(
            f"{run.name}: its {source} has no two different answers to one prompt. Take another "
            f"source with --from: {others}."
        )
    return pairs


def _evaluation(run: Run) -> list[Pair]:
    rows = (
        (row["prompt"], row["before"]["response"], row["after"]["response"])
        for row in run.answers()
    )
    return [Pair(*texts, source=f"{run.name}: evaluation") for texts in rows]


def _rollouts(run: Run, source: str, seed: int) -> list[Pair]:
    pairs: list[Pair] = []
    waiting: dict[str, tuple[int, Sample]] = {}
    for step in reversed(run.steps()[-STEPS_READ:]):
        groups: dict[int, list[Sample]] = {}
        try:
            for sample in run.samples(step):
                groups.setdefault(sample.group, []).append(sample)
        except DamagedRun:
            continue
        for samples in groups.values():
            if source == "best-of-n":
                pairs += _best_of(samples, f"{run.name}: step {step}", seed)
                continue
            for sample in samples:
                other = waiting.pop(sample.prompt, None)
                if other is None or other[1].response == sample.response:
                    waiting[sample.prompt] = step, sample
                else:
                    steps = f"steps {step} and {other[0]}" if step != other[0] else f"step {step}"
                    pairs.append(_pair(sample, other[1], f"{run.name}: {steps}"))
    return pairs


def _best_of(samples: Sequence[Sample], source: str, seed: int) -> list[Pair]:
    scored = [sample for sample in samples if not math.isnan(sample.score)]
    if len(scored) < 2:
        return []
    best = max(scored, key=lambda sample: sample.score)
    others = [sample for sample in scored if sample.response != best.response]
    if not others:
        return []
    other = random.Random(f"{seed} {source} {best.group}").choice(others)
    return [_pair(best, other, source)]


def _pair(one: Sample, two: Sample, source: str) -> Pair:
    return Pair(one.prompt, one.response, two.response, source, _uncertainty(one, two))


def _uncertainty(one: Sample, two: Sample) -> float | None:
    """Return √(σ₁² + σ₂²) of the ensemble's deviations of both scores, as of independent ones; None
    where they were not recorded."""
    deviations = [
        value
        for sample in (one, two)
        for name, value in sample.components.items()
        if name.startswith("deviation/") and value is not None
    ]
    return math.hypot(*deviations) if deviations else None
