"""What every loop yields."""

import time
from dataclasses import dataclass, field

from quartet.experience import Rollout


@dataclass(frozen=True)
class Progress:
    """One step of a loop: its number, from 1, and its metrics."""

    number: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict, kw_only=True)
    """How long each phase of the step took. Not among the metrics, which two equal runs share."""
    is_last: bool = field(default=False, kw_only=True)
    """Whether the stage ends here, before the number of steps that it was to take."""


@dataclass(frozen=True)
class Sampled(Progress):
    """One step of a loop that samples responses: they are kept in the record."""

    rollouts: list[Rollout]


class Clock:
    """Measures the phases of a step, which follow one another from its construction on."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End the phase: record its seconds under this name."""
        now = time.perf_counter()
        self.laps[phase], self._last = round(now - self._last, 4), now
