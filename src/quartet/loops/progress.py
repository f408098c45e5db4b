"""What every loop yields at least."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of a loop: its number, from 1, and its metrics."""

    number: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict, kw_only=True)
    """How long each phase of the step took. Apart from the metrics, which two equal runs have in common."""


class Clock:
    """Measures phases, one after the other."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self._laps[phase], self._last = self._laps.get(phase, 0.0) + now - self._last, now

    def laps(self) -> dict[str, float]:
        """All since the last call."""
        laps, self._laps = {phase: round(seconds, 4) for phase, seconds in self._laps.items()}, {}
        self._last = time.perf_counter()
        return laps
