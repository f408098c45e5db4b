"""Tasks whose gold reward is known: small enough for a test, real enough to learn. Most make their
own texts; `labelled_texts` reads the user's."""

from collections.abc import Callable

from quartet.worlds.guess import Guess
from quartet.worlds.labelled_texts import LabelledTexts
from quartet.worlds.protocol import World, gold_accuracy
from quartet.worlds.reviews import Reviews
from quartet.worlds.sums import Sums

WORLDS: dict[str, Callable[[int], World]] = {"reviews": Reviews, "sums": Sums, "guess": Guess}
"""The worlds that make their own texts, from a seed."""


def make_world(name: str, seed: int, texts: str | None) -> World:
    """Return a world. `texts` is the file of one that reads the user's. Raises DataError."""
    if name == LabelledTexts.name:
        assert texts is not None, "a rule of the config asks for it"
        return LabelledTexts(seed, texts)
    return WORLDS[name](seed)


__all__ = ["WORLDS", "LabelledTexts", "World", "gold_accuracy", "make_world"]
