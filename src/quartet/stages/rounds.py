"""Rounds of a recipe: label, reward_model and an RL stage, once more from where the policy now is
(Ziegler et al. 2019)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LABEL = "label"
"""The stage that begins a round."""


@dataclass(frozen=True)
class Round:
    """One round of a recipe: where it keeps its results, and where those of the round before are.

    The last round writes to the run's folder itself, as a recipe of one round does; earlier ones
    write to `round-1/`, `round-2/`, … in it.
    """

    number: int = 1
    count: int = 1

    def folder(self, run: Path) -> Path:
        """Return the folder of this round's results. `run` is the run's folder."""
        return run if self.number == self.count else run / f"round-{self.number}"

    def before(self, run: Path) -> Path | None:
        """Return the folder of the results of the round before; None for the first round."""
        return None if self.number == 1 else run / f"round-{self.number - 1}"


ONLY_ROUND = Round()
"""The round of a recipe that has no other."""


def rounds_of(recipe: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the stages of each round of a recipe. Each stage `label` but the first begins one."""
    labels = [place for place, stage in enumerate(recipe) if stage == LABEL]
    ends = [0, *labels[1:], len(recipe)]
    return [tuple(recipe[a:b]) for a, b in itertools.pairwise(ends)]
