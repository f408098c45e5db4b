"""What every loop yields at least."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of a loop: its number, from 1, and its metrics."""

    number: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict, kw_only=True)
    """How long each phase of the step took. Apart from the metrics, which two equal runs have in
    common."""


class Clock:
    """Measures the phases of a step, one after the other, from when it is made."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self.laps[phase], self._last = round(now - self._last, 4), now
