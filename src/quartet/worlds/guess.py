"""A guessing game of several turns: a letter from a to p, found in at most four guesses. The host
says whether the secret comes before (`<`) or after (`>`) the guess, or that it is found (`=`)."""

import random
from collections.abc import Sequence
from typing import Any

from quartet.data.examples import Example
from quartet.experience import Prompt
from quartet.generation.episodes import Message
from quartet.worlds.tokenizers import SPECIAL, character_tokenizer

LETTERS = "abcdefghijklmnop"
ALPHABET = LETTERS + "?<>="
GUESSES = 4
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


class Host:
    """The environment of one game. The reward is 1 for the right guess, else 0."""

    def reset(self, prompt: Prompt) -> Sequence[Message]:
        self.secret = str(prompt.extra["secret"])
        return []

    def step(self, response: str) -> tuple[Sequence[Message], float, bool]:
        if response == self.secret:
            return [message("=")], 1.0, True
        if len(response) != 1 or response not in LETTERS:
            return [], 0.0, True  # no guess at all: the game is over
        return [message("<" if self.secret < response else ">")], 0.0, False


def message(text: str) -> Message:
    return {"role": "user", "content": text}


class Guess:
    """The world `guess`. The demonstrations are of a player who guesses at random, six times in ten
    among the letters that are still possible; halving finds 15 secrets of 16 in four guesses. The
    held-out games have the same 16 secrets: the policy never sees them, only the host's answers."""

    name = "guess"
    typical_tokens = (1, 11)
    heeds = 0.6
    max_turns = GUESSES

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def vocabulary(self) -> int:
        return len(SPECIAL) + len(ALPHABET)

    def environment(self) -> Host:
        return Host()

    def demonstrations(self, count: int, held_out: bool = False) -> list[Example]:
        rng = random.Random(f"guess/{self.seed}/demonstrations/{held_out}")
        return [self._game(number, rng) for number in range(count)]

    def comparisons(self, count: int, held_out: bool = False) -> list[Example]:
        return []

    def prompts(self, count: int, held_out: bool = False) -> list[Example]:
        rng = random.Random(f"guess/{self.seed}/prompts/{held_out}")
        secrets = [rng.choice(LETTERS) for _ in range(count)]
        return [
            Example(f"guess:{i}:{secret}", [message("?")], extra={"secret": secret})
            for i, secret in enumerate(secrets)
        ]

    def gold(self, prompt: str, response: str) -> float:
        """Return 1 where the last answer of the host says that the letter was found, else 0."""
        return float(response.endswith("="))

    def tokenizer(self) -> Any:
        tokenizer = character_tokenizer(ALPHABET)
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    def _game(self, number: int, rng: random.Random) -> Example:
        host, possible, talk = Host(), list(LETTERS), list[Message]()
        secret = rng.choice(LETTERS)
        host.reset(Prompt("", (), "", {"secret": secret}))
        for _ in range(GUESSES):
            guess = rng.choice(possible if rng.random() < self.heeds else LETTERS)
            answer, _, is_over = host.step(guess)
            talk += [{"role": "assistant", "content": guess}, *answer]
            possible = [
                x for x in possible if (x < guess) == (secret < guess) and x != guess
            ] or list(LETTERS)
            if is_over:
                break
        while talk[-1]["role"] != "assistant":
            talk.pop()
        return Example(f"guess:{number}", [message("?")], completion=talk)
