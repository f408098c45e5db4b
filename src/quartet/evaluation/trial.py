"""Testing a reward on responses from a file before it is used in a run. Imports no torch."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quartet.data.examples import Example, Text
from quartet.data.shapes import read_examples
from quartet.experience import Prompt, Rollout
from quartet.rewards.functions import FunctionReward
from quartet.rewards.protocol import Reward, RewardError, Score
from quartet.rewards.verifiable import ExactMatch, MathMatch, NumberMatch

VERIFIERS: dict[str, Callable[[str], Reward]] = {
    "exact": ExactMatch,
    "number": NumberMatch,
    "math": MathMatch,
}


@dataclass(frozen=True)
class RewardTrial:
    """A reward's scores of some responses. Statistics are over the finite scores; they are None
    where there are too few."""

    answers: int
    none: int
    nan: int
    least: float | None
    most: float | None
    mean: float | None
    deviation: float | None
    different: int
    """The number of distinct scores."""
    length_correlation: float | None
    """Pearson's r of the score with the answer's length in characters."""
    seconds: float
    accuracy: float | None
    """For comparisons, the share in which the chosen side scored higher; a tie counts half."""
    examples: tuple[tuple[Score, str], ...]
    """The lowest and the highest answers, shortened."""


def try_reward(reward: Reward, rollouts: Sequence[Rollout], pairs: bool) -> RewardTrial:
    """Score the responses and return the statistics. With `pairs` they alternate: chosen,
    rejected."""
    started = time.monotonic()
    scores = reward.score(rollouts)
    seconds = time.monotonic() - started
    scored = [
        (s, r) for s, r in zip(scores, rollouts, strict=True) if s is not None and math.isfinite(s)
    ]
    numbers = [s for s, _ in scored]
    lengths = [len(r.response) for _, r in scored]
    varied = len(set(numbers)) > 1 and len(set(lengths)) > 1
    ranked = sorted(scored, key=lambda pair: pair[0])
    shown = [*ranked[:2], *ranked[-2:]] if len(ranked) > 3 else ranked
    return RewardTrial(
        answers=len(rollouts),
        none=sum(s is None for s in scores),
        nan=sum(s is not None and not math.isfinite(s) for s in scores),
        least=min(numbers, default=None),
        most=max(numbers, default=None),
        mean=statistics.fmean(numbers) if numbers else None,
        deviation=statistics.pstdev(numbers) if numbers else None,
        different=len(set(numbers)),
        length_correlation=statistics.correlation(numbers, lengths) if varied else None,
        seconds=seconds,
        accuracy=_accuracy(scores[::2], scores[1::2]) if pairs else None,
        examples=tuple((s, r.response) for s, r in shown),
    )


def findings(trial: RewardTrial) -> list[str]:
    """Return sentences about what may go wrong in training with this reward."""
    sentences = []
    if trial.nan:
        sentences.append(
            f"{trial.nan} of {trial.answers} scores are NaN or infinite: a run leaves these "
            f"answers out, as if there were no score."
        )
    if trial.none:
        sentences.append(
            f"{trial.none} of {trial.answers} answers got None: a run leaves them out."
        )
    if trial.different == 1 and trial.answers > 1:
        sentences.append("all answers got the same number: there is nothing to learn from it.")
    if trial.length_correlation is not None and abs(trial.length_correlation) > 0.5:
        longer = "longer" if trial.length_correlation > 0 else "shorter"
        sentences.append(
            f"{longer} answers score higher (r = {trial.length_correlation:.2f}): the policy will "
            f"find that out."
        )
    if trial.accuracy is not None and trial.accuracy < 0.5:
        sentences.append(
            f"the rejected side scores higher in {1 - trial.accuracy:.0%} of comparisons: is the "
            f"sign right?"
        )
    return sentences


def _accuracy(chosen: Sequence[Score], rejected: Sequence[Score]) -> float | None:
    sides = [
        (c, r) for c, r in zip(chosen, rejected, strict=True) if c is not None and r is not None
    ]
    return (
        sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in sides) / len(sides)
        if sides
        else None
    )


def trial_on_file(
    function: str, file: Path, columns: Mapping[str, str], timeout: float
) -> RewardTrial:
    """Test a function, or the verifier of that name, on a file's responses: its completions, or
    both sides of its comparisons."""
    examples = read_examples(file, "demonstrations", columns)
    pairs = all(e.rejected is not None for e in examples)
    texts = _Texts()
    reward: Reward
    if function in VERIFIERS:
        reward = VERIFIERS[function](function)
        if lacking := next((e for e in examples if "answer" not in e.extra), None):
            raise RewardError(
                f"{lacking.id}: has no column answer, which {function} compares with."
            )
    else:
        reward = FunctionReward(function, function, texts.of, timeout)
    rollouts = [
        texts.rollout(example, answer) for example in examples for answer in _answers(example)
    ]
    return try_reward(reward, rollouts, pairs)


def _answers(example: Example) -> list[Text]:
    sides = (
        (example.completion,)
        if example.completion is not None
        else (example.chosen, example.rejected)
    )
    return [side for side in sides if side is not None]


class _Texts:
    """Splits texts into words that stand for tokens, because a trial has no tokenizer."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.by_number: list[str] = []

    def of(self, ids: Sequence[int]) -> list[str]:
        return [self.by_number[i] for i in ids]

    def rollout(self, example: Example, answer: Text) -> Rollout:
        text, prompt = plain(answer), plain(example.prompt)
        messages = None if isinstance(example.prompt, str) else example.prompt
        pieces = [word + " " for word in text.split(" ")]
        pieces[-1] = pieces[-1][:-1]
        for piece in pieces:
            if piece not in self.words:
                self.words[piece] = len(self.by_number)
                self.by_number.append(piece)
        return Rollout(
            id=example.id,
            prompt=Prompt(example.id, (), prompt, dict(example.extra), messages),
            group=0,
            response_ids=tuple(self.words[piece] for piece in pieces),
            response=text,
            logprobs=(0.0,) * len(pieces),
            finish_reason="stop",
            policy_version=0,
        )


def plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
