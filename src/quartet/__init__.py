"""Quartet: RLHF for language models, from a laptop to a cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet.runs.reader import Run as Run

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`quartet.Run` without what it takes to import it, until somebody asks."""
    if name == "Run":
        from quartet.runs.reader import Run

        return Run
    raise AttributeError(f"module 'quartet' has no attribute '{name}'")
