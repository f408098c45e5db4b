"""The checkpoints of a run: which there are, which are kept, and which can be used."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quartet.files import read_json, remove_folder
from quartet.training.checkpoint import (
    STATE,
    Checkpoint,
    DamagedCheckpoint,
    read_checkpoint,
    write_checkpoint,
)
from quartet.training.state_tree import Tree


class Checkpoints:
    """The folder of a run's checkpoints, with names such as `ppo-000060`.

    A checkpoint of step 0 holds no weights: it marks where a stage begins. All of these are kept.
    """

    def __init__(
        self, folder: Path, stages: Mapping[str, int], keep_last: int = 2, keep_best: bool = False
    ) -> None:
        """`stages` gives each stage's name its place in the order in which stages run."""
        self.folder, self.stages = folder, stages
        self.keep_last, self.keep_best = keep_last, keep_best

    def write(
        self, stage: str, step: int, state: Tree | Callable[[Path], Any], facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, and then delete those that are no longer needed."""
        path = write_checkpoint(
            self.folder / f"{stage}-{step:06d}", state, {"stage": stage, "step": step, **facts}
        )
        if step:
            self.remove_superfluous()
        return path

    def remove_superfluous(self, since: str | None = None) -> None:
        """Delete the checkpoints that are no longer needed. A run that goes on from the checkpoint
        `since` deletes what a kill left: newer ones, which may be damaged, do not count."""
        for folder in self.superfluous(since):
            remove_folder(folder)

    def superfluous(self, since: str | None = None) -> list[Path]:
        """Return the checkpoints with weights, except the last `keep_last` and the best. Those that
        are newer than `since` are passed over."""
        paths = self.newest_first()
        if since is not None:
            paths = paths[[path.name for path in paths].index(since) :]
        full = [path for path in paths if not path.name.endswith("-000000")]
        measured = [path for path in full if merit(path) is not None]
        best = (
            max(measured, key=lambda path: merit(path) or 0.0, default=None)
            if self.keep_best
            else None
        )
        return [path for path in full[self.keep_last :] if path != best]

    def newest_first(self) -> list[Path]:
        """Return the checkpoints' folders by stage and step, the newest first."""
        folders = [
            (self._place(path.name), path) for path in self.folder.glob("*-[0-9]*") if path.is_dir()
        ]
        known = [(place, path) for place, path in folders if place is not None]
        return [path for _, path in sorted(known, reverse=True)]

    def usable(
        self, misfit: Callable[[Checkpoint], str | None]
    ) -> Iterator[tuple[Path, Checkpoint | str]]:
        """Yield each checkpoint, the newest first, or in its place the reason why it is unusable:
        that it is damaged, or what `misfit` returns."""
        for path in self.newest_first():
            try:
                checkpoint = read_checkpoint(path)
            except DamagedCheckpoint as damage:
                yield path, str(damage)
                continue
            yield path, misfit(checkpoint) or checkpoint

    def _place(self, name: str) -> tuple[int, int] | None:
        stage, _, step = name.rpartition("-")
        return (
            (self.stages[stage], int(step)) if stage in self.stages and step.isdecimal() else None
        )


def merit(folder: Path) -> float | None:
    """Return how well the stage did at a checkpoint, or None where that cannot be read."""
    try:
        value = read_json(folder / STATE)["facts"]["merit"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
