"""What happens in a run, as data: a pipeline yields these; screens and programs consume them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quartet.errors import QuartetError
from quartet.loops.progress import Progress
from quartet.stages.protocol import Stage, Summary


@dataclass(frozen=True)
class Started:
    """A stage starts, or goes on in a resumed run."""

    stage: Stage
    number: int
    """Its place in the recipe, from 1."""
    of: int
    """How many stages there are."""
    done: int = 0
    """Steps that were done before the run was resumed."""
    earlier: Sequence[Mapping[str, float]] = ()
    """The metrics of those steps."""


@dataclass(frozen=True)
class Advanced:
    """A step is done and recorded."""

    stage: Stage
    progress: Progress


@dataclass(frozen=True)
class Warned:
    """The doctor, the memory budget or a tracker has something to say."""

    stage: Stage
    step: int
    sentence: str


@dataclass(frozen=True)
class Finished:
    """A stage is done and its results are written."""

    stage: Stage
    summary: Summary
    seconds: float


Event = Started | Advanced | Warned | Finished


class StageFailed(QuartetError, RuntimeError):
    """A stage that could not go on: its name, the step, and the cause."""
