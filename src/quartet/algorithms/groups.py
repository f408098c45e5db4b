"""Which groups of rollouts are worth learning from."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from quartet.parts import Field, part


@part
class AllGroups:
    """Every prompt counts, with or without signal."""

    type: Literal["all"] = "all"
    max_rounds: ClassVar[int] = 1

    def keep(self, scores: Sequence[float]) -> bool:
        return True


@part
class DynamicSampling:
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): a group whose responses all score the same has no advantage. It is
    dropped, and more prompts are sampled until the step is full or `max_rounds` batches of prompts were tried; then the step
    is what there is."""

    type: Literal["dynamic_sampling"] = "dynamic_sampling"
    max_rounds: int = Field(default=10, ge=1, description="How many batches of prompts one step may try.")

    def keep(self, scores: Sequence[float]) -> bool:
        return min(scores) < max(scores)


Groups = Annotated[AllGroups | DynamicSampling, Field(discriminator="type")]
