"""Pairs of answers that are to be compared."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Text = str | Sequence[Mapping[str, Any]]
"""Plain text, or a conversation: messages with `role` and `content`."""


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers."""

    prompt: Text
    answer_a: Text
    answer_b: Text
    source: str = ""
    """Where the answers come from, such as `pairs.jsonl:3` or `ppo, step 40`."""
    uncertainty: float | None = None
    """The deviation of the difference of the two scores among the members of a reward-model
    ensemble; None where it is not known."""

    @cached_property
    def id(self) -> str:
        """A hash of the prompt and the two answers, whichever comes first."""
        answers = sorted(json.dumps(answer) for answer in (self.answer_a, self.answer_b))
        return digest(json.dumps(self.prompt), *answers)


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the parts."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def share(*parts: object) -> float:
    """Return a number in [0, 1) that is drawn by the hash of the parts."""
    return int(digest(*parts), 16) / 2**64


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs whose answers differ, each once. A pair with an empty answer, from which no
    model can learn, is left out."""
    different = (
        pair
        for pair in pairs
        if pair.answer_a != pair.answer_b
        and not (_is_empty(pair.answer_a) or _is_empty(pair.answer_b))
    )
    return list({pair.id: pair for pair in different}.values())


def _is_empty(answer: Text) -> bool:
    text = answer if isinstance(answer, str) else str(answer[-1]["content"])
    return not text.strip()


def all_pairs(prompt: Text, answers: Sequence[Text], source: str = "") -> list[Pair]:
    """Return the pairs of all answers to one prompt: n (n − 1) / 2 of n answers."""
    return [Pair(prompt, a, b, source) for a, b in itertools.combinations(answers, 2)]


def in_order(pairs: Sequence[Pair], seed: int, uncertain_first: bool = False) -> list[Pair]:
    """Return the pairs in a random order of the seed, or the most uncertain ones first."""
    shuffled = sorted(pairs, key=lambda pair: digest("order", seed, pair.id))
    if not uncertain_first:
        return shuffled
    return sorted(shuffled, key=lambda pair: -(pair.uncertainty or 0.0))
