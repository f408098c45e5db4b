"""Pairs to be labelled, from what a run's policies answered."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from quartet.labels.pairs import Pair, Text, distinct
from quartet.runs.reader import DamagedRun, NoRun, Run
from quartet.runs.rollouts import Sample

Source = Literal["evaluation", "rollouts", "best-of-n"]
SOURCES: tuple[str, ...] = get_args(Source)
STEPS_READ = 20
"""How many of the last recorded steps pairs are taken from."""


@dataclass(frozen=True)
class Candidate:
    """A rollout as training data has it."""

    prompt: Text
    response: str
    sample: Sample


def run_pairs(run: Run, source: str | None = None, seed: int = 0) -> list[Pair]:
    """Return pairs of different answers to the same prompt.

    `evaluation`: the trained policy's answer and the first policy's, of the stage evaluation.
    `rollouts`: two of the policy's own answers, of one group or of different steps. `best-of-n`:
    in each group of rollouts, the answer with the highest score and a random other. None takes the
    evaluation where there is one. Raises `NoRun` where there is no such pair, or the rollouts were
    recorded without the texts of prompts and responses.
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
    waiting: dict[str, tuple[int, Candidate]] = {}
    for step, groups in _groups(run):
        for answers in groups:
            if source == "best-of-n":
                pairs += _best_of(answers, f"{run.name}: step {step}", seed)
                continue
            for answer in answers:
                key = json.dumps(answer.prompt)
                other = waiting.pop(key, None)
                if other is None or other[1].response == answer.response:
                    waiting[key] = step, answer
                else:
                    steps = f"steps {step} and {other[0]}" if step != other[0] else f"step {step}"
                    pairs.append(_pair(answer, other[1], f"{run.name}: {steps}"))
    return pairs


def _groups(run: Run) -> Iterator[tuple[int, list[list[Candidate]]]]:
    """Yield the last recorded steps, the last one first, each with the answers of its groups.
    Raises `NoRun` where there are rollouts and none has its texts."""
    num_samples = num_answers = 0
    for step in reversed(run.steps()[-STEPS_READ:]):
        try:
            samples = run.samples(step)
        except DamagedRun:
            continue
        groups: dict[int, list[Candidate]] = {}
        for sample in samples:
            if sample.texts is not None:
                groups.setdefault(sample.group, []).append(Candidate(*sample.texts, sample))
                num_answers += 1
        num_samples += len(samples)
        yield step, list(groups.values())
    if num_samples and not num_answers:
        raise NoRun(
            f"{run.name}: its rollouts were recorded without the texts of prompts and responses, "
            "by an earlier version or with an environment. Take another source, --from evaluation, "
            "or a new run."
        )


def _best_of(answers: Sequence[Candidate], source: str, seed: int) -> list[Pair]:
    scored = [answer for answer in answers if not math.isnan(answer.sample.score)]
    if len(scored) < 2:
        return []
    best = max(scored, key=lambda answer: answer.sample.score)
    others = [answer for answer in scored if answer.response != best.response]
    if not others:
        return []
    other = random.Random(f"{seed} {source} {best.sample.group}").choice(others)
    return [_pair(best, other, source)]


def _pair(one: Candidate, two: Candidate, source: str) -> Pair:
    uncertainty = _uncertainty(one.sample, two.sample)
    return Pair(one.prompt, one.response, two.response, source, uncertainty)


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
