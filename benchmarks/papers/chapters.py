"""The world of long_answers.py: answers of several chapters, a few of whose tokens decide."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import quartet
from quartet.worlds.tokenizers import character_tokenizer

EASY, HARD, FIRST_LETTER = "?", "!", 0x4E00


@dataclass(frozen=True)
class World:
    """Answers of several chapters, and of a remark that some have behind the last.

    A chapter begins with one of two options, a capital letter, and goes on with a fixed sequence of
    letters. Every fourth of these has two forms, which count for nothing. An answer is right if all
    chapters are whole and their options are the right ones, which only its end tells.

    With one prompt, the right options are the same for all answers. With more, a prompt names the
    right option of each chapter in lower case, after "?" or "!". Those with "!" are hard: there,
    demonstrations are half as far above chance.
    """

    chapters: int = 4
    letters: int = 127
    remark: int = 64
    right_share: float = 0.65
    """The share of demonstrations in which a chapter's option is the right one."""
    prompts: int = 1
    """At most 2 ** (chapters + 1)."""

    @property
    def options(self) -> list[str]:
        """The two options of each chapter."""
        return [chr(65 + 2 * k) + chr(66 + 2 * k) for k in range(self.chapters)]

    @cached_property
    def right(self) -> dict[str, str]:
        """The right option of each chapter, by prompt. With one prompt: the first and the second
        option by turns. With more: every second prompt is hard."""
        if self.prompts == 1:
            return {EASY: "".join(pair[k % 2] for k, pair in enumerate(self.options))}
        every = map("".join, itertools.product(*self.options))
        prompts = ((kind + right.lower(), right) for right in every for kind in (EASY, HARD))
        return dict(itertools.islice(prompts, self.prompts))

    def forms(self, chapter: int, place: int) -> str:
        """Return the forms of a letter; the remark is the last chapter."""
        first = FIRST_LETTER + 2 * (chapter * self.letters + place)
        varies = chapter < self.chapters and place % 4 == 0
        return chr(first) + (chr(first + 1) if varies else "")

    def _sequence(self, chapter: int) -> list[str]:
        length = self.letters if chapter < self.chapters else self.remark
        return [self.forms(chapter, place) for place in range(length)]

    def tokenizer(self) -> Any:
        letters = (forms for k in range(self.chapters + 1) for forms in self._sequence(k))
        answers = "".join([*self.options, *letters])
        prompts = dict.fromkeys("".join(self.right))
        return character_tokenizer("".join(prompts) + answers)

    def answer(self, options: Sequence[str], rng: random.Random) -> str:
        """Return an answer with these options; half of all have the remark."""
        chapters = [(option, self._sequence(k)) for k, option in enumerate(options)]
        if rng.random() < 0.5:
            chapters.append(("", self._sequence(self.chapters)))
        return "".join(o + "".join(map(rng.choice, letters)) for o, letters in chapters)

    def demonstrations(self, count: int, rng: random.Random) -> Iterator[dict[str, str]]:
        for prompt in self._in_turn(count):
            yield {"prompt": prompt, "completion": self.answer(self._careless(prompt, rng), rng)}

    def comparisons(self, count: int, rng: random.Random) -> Iterator[dict[str, str]]:
        """Yield a right answer beside a wrong one."""
        for prompt in self._in_turn(count):
            right = self.right[prompt]
            while (wrong := self._careless(prompt, rng)) == list(right):
                pass
            chosen, rejected = self.answer(right, rng), self.answer(wrong, rng)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _in_turn(self, count: int) -> Iterator[str]:
        return itertools.islice(itertools.cycle(self.right), count)

    def _careless(self, prompt: str, rng: random.Random) -> list[str]:
        share = self.right_share
        if prompt.startswith(HARD):
            share = (0.5 + share) / 2
        pairs = zip(self.options, self.right[prompt], strict=True)
        return [r if rng.random() < share else p.replace(r, "") for p, r in pairs]

    def options_of(self, text: str) -> str | None:
        """Return the options of an answer, or None where it has not the form of demonstrations: a
        chapter is missing, or has another number of letters."""
        chapter = self.letters + 1
        whole = self.chapters * chapter
        options, every = text[:whole:chapter], set("".join(self.options))
        formed = (
            len(text) in (whole, whole + self.remark)
            and all(o in pair for o, pair in zip(options, self.options, strict=True))
            and sum(c in every for c in text) == self.chapters
        )
        return options if formed else None

    def reward(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return 1 for each response of the right form with the options that its prompt makes
        right, else 0."""
        pairs = zip(prompts, responses, strict=True)
        return [float(self.options_of(response) == self.right[p]) for p, response in pairs]


@dataclass(frozen=True)
class Answer:
    """A sampled answer: what the policy and the critic said of it."""

    world: World
    prompt: str
    text: str
    values: list[float]
    """Of the critic, before each token."""
    option_probs: list[float]
    """Of the right option of each chapter, before it was chosen."""
    score: float

    @classmethod
    def of(cls, world: World, rows: Iterable[dict[str, Any]]) -> "Answer | None":
        """Return the answer that these rows of tokens, prompt and response, are; None for one of
        another form."""
        tokens: list[dict[str, Any]] = []
        prompt = ""
        for row in rows:
            if row["is_response"]:
                tokens.append(row)
            else:
                prompt += row["text"]
        text = "".join(row["text"] for row in tokens).removesuffix("<eos>")
        options = world.options_of(text)
        if options is None:
            return None
        firsts = tokens[: world.chapters * (world.letters + 1) : world.letters + 1]
        probs = [math.exp(row["old_logprob"]) for row in firsts]
        chosen = zip(probs, options, world.right[prompt], strict=True)
        return cls(
            world,
            prompt,
            text,
            [row["value"] for row in tokens],
            [p if option == wanted else 1 - p for p, option, wanted in chosen],
            tokens[0]["score"],
        )

    def true_values(self, formed: float) -> list[float]:
        """Return, for each token, the probability before it that the answer will be right: 0 behind
        a wrong option, else the product of the right options' probabilities that are to come, times
        that of keeping the form, `formed` for a whole answer and the same for each token.

        An option was chosen at 0.6, 0.5 is to come, a chapter has one letter, formed = 1: 0.3, 0.5,
        0.5, 1, …
        """
        chapter, right, values = self.world.letters + 1, self.world.right[self.prompt], []
        length = len(self.values)
        for place in range(length):
            begun = min((place + chapter - 1) // chapter, self.world.chapters)
            chosen = self.text[: begun * chapter : chapter]
            rest = formed ** ((length - place) / length)
            to_come = math.prod(self.option_probs[begun:]) * rest
            values.append(to_come if chosen == right[:begun] else 0.0)
        return values


@dataclass(frozen=True)
class Answers:
    """The answers of a step that have the form of the demonstrations."""

    found: list[Answer]
    formed: float
    """Their share of all."""


def answers_of(world: World, run: quartet.Run, step: int) -> Answers:
    rows: dict[int, list[dict[str, Any]]] = {}
    columns = ["sample", "is_response", "text", "old_logprob", "value", "score"]
    for row in run.rollouts(step, columns=columns).to_pylist():
        rows.setdefault(row["sample"], []).append(row)
    found = (Answer.of(world, tokens) for tokens in rows.values())
    answers = [answer for answer in found if answer is not None]
    return Answers(answers, len(answers) / len(rows))
