"""What a stage is: it begins with its models loaded, yields steps, and leaves its results."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quartet.loops.progress import Progress
from quartet.training.budget import Budget
from quartet.training.optim import Optimizer
from quartet.training.state_tree import Stateful, Tree

OPTIONAL = frozenset({"ahead", "held_out", "reference", "first_answers"})
"""The parts of a state that a checkpoint may lack."""
Summary = dict[str, Any]
"""What is known at the end of a stage, by name: JSON."""


@dataclass(frozen=True)
class StageRun:
    """A stage that has begun: its models are loaded."""

    steps: Callable[[int], Iterator[Progress]]
    """Return the steps that follow the given number of finished steps."""
    finish: Callable[[], Summary]
    """Write the results to the run folder and return the summary."""
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """Everything that changes from step to step, by its name in a checkpoint."""
    optimizers: Sequence[Optimizer] = ()
    budget: Budget | None = None
    settle: Callable[[], None] = lambda: None
    """Wait until the tensors of a state can be read: copies to main memory may be under way."""

    def state(self) -> Tree:
        """Return what a checkpoint holds. Its tensors are the live ones: the next step changes
        them. `settle` comes before they are read, so that a state that is only kept makes nothing
        wait."""
        return {name: part.state() for name, part in self.stateful.items()}

    def copy_state(self) -> Tree:
        """Return a copy of the present state, which later steps leave as it is."""
        self.settle()
        return copy.deepcopy(self.state())

    def load_state(self, state: Tree) -> None:
        """Continue from the state of a checkpoint.

        A checkpoint without "ahead" is one of a run that did not sample ahead, one without
        "held_out" of a stage that was not evaluated, and one without "reference" or "first_answers"
        of a version that did not write it; they may continue as those that have it. Raises KeyError
        if another part is missing.
        """
        for name, part in self.stateful.items():
            if name in state or name not in OPTIONAL:
                part.load_state(state[name])

    def notes(self) -> list[str]:
        """Return the sentences about memory since the last call, and forget them."""
        if self.budget is None:
            return []
        notes, self.budget.notes = self.budget.notes, []
        return notes

    def optimizer_steps(self) -> int:
        """Return how many optimizer steps there have been: between two equal counts no weight has
        changed."""
        return sum(optimizer.steps for optimizer in self.optimizers)


@runtime_checkable
class Stage(Protocol):
    """One stage of a run, ready to begin. It holds data and functions that make models, no model
    yet."""

    @property
    def name(self) -> str:
        """What the recipe calls it, such as "sft" or "ppo"."""
        ...

    @property
    def title(self) -> str:
        """The name as it is shown."""
        ...

    @property
    def num_steps(self) -> int: ...

    def begin(self, folder: Path) -> StageRun:
        """Load the models; no step has been taken yet. `folder` is the run's."""
        ...
