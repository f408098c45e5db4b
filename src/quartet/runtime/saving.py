"""What of a run is written, and when a checkpoint is due."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quartet.recording.metric import Metric

MAX_SHARE = 0.02
"""The share of a run's time that checkpoints take at most, if the user sets no interval."""
MIN_SECONDS = 10.0
"""The least time between two checkpoints, if the user sets no interval."""


@dataclass(frozen=True)
class Saving:
    """What of a run is written, and how often."""

    rollouts_every: int | None = 1
    """Steps between two whose rollouts are written; None: about `KEPT_STEPS` of a stage are."""
    every: int | None = None
    """Steps between checkpoints; None: as often as `MAX_SHARE` allows."""
    last: int = 2
    """How many checkpoints are kept, beside the best."""
    best: str | None = None
    """The metric by which one more checkpoint is kept, with "-" before it where less is better."""
    rollbacks: int = 0
    """How often a stage may go back to its last checkpoint, with half the learning rate, if a
    number is not finite."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """What a resumed run must have in common with this one."""
    metrics: Sequence[Metric] = ()
    """The user's own metrics of RL steps."""


@dataclass
class CheckpointTimer:
    """Decides when the next checkpoint is due."""

    every: int | None
    """Steps between checkpoints; None: by time."""
    last: float = field(default_factory=time.monotonic)
    """When the last checkpoint was written, on the monotonic clock."""
    duration: float = 0.0
    """The seconds that it took."""
    last_step: int = 0
    """The step that it was written after; 0 for the beginning of the stage."""

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a checkpoint is due after this step. One always is after the last step."""
        if step == num_steps:
            return True
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.last > max(MIN_SECONDS, self.duration / MAX_SHARE)

    def written(self, began: float, step: int) -> float:
        """Note that the checkpoint of a step is written, which was begun at `began`; return its
        seconds."""
        self.last_step = step
        self.last = time.monotonic()
        self.duration = self.last - began
        return round(self.duration, 4)


class RunningMean:
    """The mean of one metric since it was last taken: by it the best checkpoint is chosen."""

    def __init__(self, name: str | None) -> None:
        """`name` is the metric's, with "-" before it where less is better; None: there is none."""
        self.name = (name or "").removeprefix("-")
        self.sign = -1 if name is not None and name.startswith("-") else 1
        self.values: list[float] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        if self.name in metrics:
            self.values.append(self.sign * metrics[self.name])

    def take(self) -> float | None:
        """Return the mean and start again; None if there was no value."""
        mean = sum(self.values) / len(self.values) if self.values else None
        self.values = []
        return mean
