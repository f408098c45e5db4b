"""What every loop yields at least."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a loop: its number, from 1, and its metrics."""

    number: int
    metrics: dict[str, float]
