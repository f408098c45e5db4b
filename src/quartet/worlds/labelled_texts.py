"""Texts with a label, good or bad, from the user's file: reviews, comments, replies.

The policy continues their beginnings, a good and a bad one make a comparison, and a classifier
trained on texts that nothing else sees is the gold reward. It says whether a policy has become good
at the task or at fooling its reward model, as far as the classifier can tell.
"""

import itertools
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from quartet.data import DataError
from quartet.data.examples import Example
from quartet.data.files import rows
from quartet.data.tokenizer import train_tokenizer

HEADING = "Review:"
"""What each prompt begins with; comparisons have nothing else for a prompt."""
BEGINNING = 3
"""How many words of a text its prompt has."""
Part = Literal["gold", "held out", "training"]
TENTHS: dict[Part, range] = {"gold": range(6), "held out": range(6, 7), "training": range(7, 10)}
"""Which tenths of all texts each part is. A text's tenth is a hash of it."""
FEWEST = 20
"""Texts of each label that each part must have."""


class LabelledTexts:
    """The world `labelled_texts`: rows with `text` and `label`, 1 for good and 0 for bad."""

    name = "labelled_texts"
    typical_tokens = (8, 24)
    vocabulary = 2048
    """Of the tokenizer of a policy that is created."""

    def __init__(self, seed: int, file: str) -> None:
        """Raises DataError for a file that cannot be used."""
        self.seed, self.file = seed, file
        texts = read_texts(file)
        self.parts: dict[Part, list[tuple[str, int]]] = {
            part: [(text, label) for text, label in texts.items() if tenth(text) in tenths]
            for part, tenths in TENTHS.items()
        }
        for part, found in self.parts.items():
            for label in (0, 1):
                count = sum(each == label for _, each in found)
                if count < FEWEST:
                    raise DataError(
                        f"{file}: leaves {count} texts with label {label} for the {part} part, of "
                        f"{len(texts)} different ones; it needs {FEWEST}. Add rows."
                    )
        self.classifier = NaiveBayes(self.parts["gold"])

    def demonstrations(self, count: int, held_out: bool = False) -> list[Example]:
        """Return beginnings and ends of texts with either label."""
        return [
            Example(
                f"text:{i}",
                f"{HEADING} {' '.join(words[:BEGINNING])}",
                completion=" " + " ".join(words[BEGINNING:]),
            )
            for i, words in enumerate(self._words(count, held_out))
        ]

    def comparisons(self, count: int, held_out: bool = False) -> list[Example]:
        """Return pairs of a good and a bad text."""
        texts = self.parts["held out" if held_out else "training"]
        good, bad = ([text for text, each in texts if each == label] for label in (1, 0))
        rng = random.Random(f"labelled_texts/{self.seed}/pairs/{held_out}")
        return [
            Example(
                f"pair:{i}",
                HEADING,
                chosen=f" {rng.choice(good)}",
                rejected=f" {rng.choice(bad)}",
            )
            for i in range(count)
        ]

    def prompts(self, count: int, held_out: bool = False) -> list[Example]:
        """Return beginnings of texts."""
        return [
            Example(f"text:{i}", f"{HEADING} {' '.join(words[:BEGINNING])}")
            for i, words in enumerate(self._words(count, held_out))
        ]

    def gold(self, prompt: str, response: str) -> float:
        """Return the classifier's probability that the response is good. It does not read the
        prompt, which the policy has not written."""
        del prompt
        return self.classifier.probability(response)

    def tokenizer(self) -> Any:
        texts = (f"{HEADING} {text}" for text, _ in self.parts["training"])
        return train_tokenizer(texts, self.vocabulary)

    def accuracy(self) -> float:
        """Return how many of the held-out labels the classifier knows."""
        texts = self.parts["held out"]
        known = [(self.classifier.probability(text) > 0.5) == (label == 1) for text, label in texts]
        return sum(known) / len(known)

    def _words(self, count: int, held_out: bool) -> list[list[str]]:
        """Return up to `count` texts that are longer than a beginning, in words."""
        texts = self.parts["held out" if held_out else "training"]
        words = [text.split() for text, _ in texts]
        long = [each for each in words if len(each) > BEGINNING]
        random.Random(f"labelled_texts/{self.seed}/{held_out}").shuffle(long)
        return long[:count]


class NaiveBayes:
    """A bag of words and of pairs of neighbours: how much likelier each is in good texts than in
    bad ones, with one added to every count; each counts once per text (Wang & Manning 2012)."""

    def __init__(self, texts: Sequence[tuple[str, int]]) -> None:
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for text, label in texts:
            counts[label].update(words_of(text))
        vocabulary = counts[0].keys() | counts[1].keys()
        bad, good = (each.total() + len(vocabulary) for each in counts)
        self.log_odds = {
            word: math.log((counts[1][word] + 1) / good) - math.log((counts[0][word] + 1) / bad)
            for word in vocabulary
        }
        labels = Counter(label for _, label in texts)
        self.prior = math.log(labels[1] / labels[0])

    def probability(self, text: str) -> float:
        """Return the probability that a text is good."""
        log_odds = self.prior + sum(self.log_odds.get(word, 0.0) for word in words_of(text))
        return 1 / (1 + math.exp(-max(min(log_odds, 50.0), -50.0)))


def words_of(text: str) -> set[str]:
    """Return the words of a text, and the pairs of neighbours."""
    words = re.findall(r"[\w']+", text.lower())
    return {*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))}


def read_texts(file: str) -> dict[str, int]:
    """Return the label of each different text of a file. Raises DataError."""
    texts: dict[str, int] = {}
    for place, row in rows(Path(file)):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text.strip() or label not in (0, 1):
            raise DataError(
                f"{place}: needs text, and label 1 (good) or 0 (bad); it has "
                f"{', '.join(f'{name} = {str(cell)[:40]!r}' for name, cell in row.items())}."
            )
        texts.setdefault(" ".join(text.split()), int(label))
    return texts


def tenth(text: str) -> int:
    """Return which tenth of all texts this one is in."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 10
