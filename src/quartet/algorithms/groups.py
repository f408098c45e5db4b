"""Which groups of rollouts are worth learning from."""

from collections.abc import Sequence
from typing import Literal

from quartet.parts import Family, Field


class Groups(Family):
    """Which groups of responses to one prompt are learnt from, and how many batches of prompts a
    step may try."""

    @property
    def max_rounds(self) -> int:
        """How many batches of prompts a step may try."""
        return 1

    def keep(self, scores: Sequence[float]) -> bool:
        """Return whether a group with these scores is kept."""
        raise NotImplementedError


class AllGroups(Groups):
    """Every prompt counts, with or without signal."""

    type: Literal["all"] = "all"

    def keep(self, scores: Sequence[float]) -> bool:
        return True


class DynamicSampling(Groups):
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): a group whose responses all score the same
    has no advantage. It is dropped, and more prompts are sampled until the step is full or
    `max_rounds` batches of prompts were tried; then the step is what there is."""

    type: Literal["dynamic_sampling"] = "dynamic_sampling"
    max_rounds: int = Field(
        default=10, ge=1, description="How many batches of prompts one step may try."
    )

    def keep(self, scores: Sequence[float]) -> bool:
        return min(scores) < max(scores)
