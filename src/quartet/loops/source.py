"""What the `[custom]` table becomes: a source, whose `step` is what the stage does."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quartet.parts import Family, Field
from quartet.training.optim import OptimizerConfig

if TYPE_CHECKING:
    from quartet.loops.custom import StageContext

Reads = Literal["prompts", "demonstrations", "comparisons"]
"""What rows of the data a stage reads."""


@dataclass(frozen=True)
class StageSource(Family, OptimizerConfig):
    """A stage of the user's own, in the place of an RL stage: it trains the policy that SFT left,
    or the one that the run starts from, and leaves it in `policy/`.

    A subclass implements `step`. Its fields are its settings, beside those of the optimizer.
    """

    _: KW_ONLY
    steps: int = Field(default=200, ge=1, kw_only=True, description="How many steps it takes.")
    batch_size: int = Field(
        default=32, ge=1, kw_only=True, description="Rows that `context.batch()` returns."
    )

    reads: ClassVar[Reads] = "prompts"
    """The rows that `context.batch()` returns."""
    needs_reference: ClassVar[bool] = False
    """Whether the policy that the stage starts from is kept, frozen."""

    @property
    def updates(self) -> int:
        """The optimizer steps of each step, which the schedule of the learning rate counts."""
        return 1

    def step(self, context: "StageContext") -> Mapping[str, float]:
        """Take one step, and return metrics by name. All ranks of a run call it alike."""
        raise NotImplementedError(f"{type(self).__name__} has no step")


__all__ = ["Reads", "StageSource"]
