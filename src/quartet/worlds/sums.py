"""Addition with a verifier: a question such as "47+85=", an answer that is right or wrong.

Answers are written from the ones up, as one adds on paper: "231" for 132. A small transformer
learns that order fast (Lee et al. 2023, "Teaching arithmetic to small transformers").
"""

import random
import zlib
from typing import Any

from quartet.data.examples import Example
from quartet.worlds.tokenizers import SPECIAL, character_tokenizer

ALPHABET = "0123456789+="


class Sums:
    """The world `sums`: two numbers of two digits.

    The demonstrations are a careless pupil's: two in three have a digit wrong. Imitation learns to
    be careless too; a verifier can reward being right. A tenth of all questions is held out of
    everything else.
    """

    name = "sums"
    typical_tokens = (6, 4)
    smallest, largest = 10, 99
    slips = 0.65
    """The share of demonstrations with one digit wrong."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def vocabulary(self) -> int:
        return len(SPECIAL) + len(ALPHABET)

    def demonstrations(self, count: int, held_out: bool = False) -> list[Example]:
        rng = random.Random(f"sums/{self.seed}/slips/{held_out}")
        questions = self._questions("demonstrations", count, held_out)
        return [
            Example(f"sums:{a}+{b}", f"{a}+{b}=", completion=self._careless(answer(a, b), rng))
            for a, b in questions
        ]

    def comparisons(self, count: int, held_out: bool = False) -> list[Example]:
        return []

    def prompts(self, count: int, held_out: bool = False) -> list[Example]:
        questions = self._questions("prompts", count, held_out)
        return [
            Example(f"sums:{a}+{b}", f"{a}+{b}=", extra={"answer": answer(a, b)})
            for a, b in questions
        ]

    def gold(self, prompt: str, response: str) -> float:
        first, second = prompt.rstrip("=").split("+")
        return float(response == answer(int(first), int(second)))

    def tokenizer(self) -> Any:
        return character_tokenizer(ALPHABET)

    def _careless(self, right: str, rng: random.Random) -> str:
        if rng.random() >= self.slips:
            return right
        at = rng.randrange(len(right))
        wrong = rng.choice([digit for digit in "0123456789" if digit != right[at]])
        return right[:at] + wrong + right[at + 1 :]

    def _questions(self, purpose: str, count: int, held_out: bool) -> list[tuple[int, int]]:
        rng = random.Random(f"sums/{self.seed}/{purpose}/{held_out}")
        questions: list[tuple[int, int]] = []
        while len(questions) < count:
            pair = (
                rng.randint(self.smallest, self.largest),
                rng.randint(self.smallest, self.largest),
            )
            if self._is_held_out(pair) == held_out:
                questions.append(pair)
        return questions

    @staticmethod
    def _is_held_out(pair: tuple[int, int]) -> bool:
        """Return whether a hash holds this pair out. An arithmetic rule would hold out some pairs
        of digits entirely, and a model cannot learn to add digits that it never saw."""
        return zlib.crc32(f"{pair[0]}+{pair[1]}".encode()) % 10 == 0


def answer(first: int, second: int) -> str:
    """Return the sum with its ones digit first: 47 and 85 give "231"."""
    return str(first + second)[::-1]
