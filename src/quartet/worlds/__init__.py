"""Embedded tasks whose gold reward is known: small enough for a test, real enough to learn."""

from collections.abc import Callable

from quartet.worlds.guess import Guess
from quartet.worlds.protocol import World
from quartet.worlds.reviews import Reviews
from quartet.worlds.sums import Sums

WORLDS: dict[str, Callable[[int], World]] = {"reviews": Reviews, "sums": Sums, "guess": Guess}

__all__ = ["WORLDS", "World"]
