"""The models that a checkpoint of a run holds, written as folders."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from quartet.assembly.assembler import Assembler
from quartet.assembly.stages import stage
from quartet.config.toml import read_settings
from quartet.errors import QuartetError
from quartet.recording.model_card import write_cards
from quartet.rewards.objects import ObjectSource
from quartet.runtime.replay import models_at
from quartet.training.checkpoint import DamagedCheckpoint, read_checkpoint
from quartet.training.checkpoints import Checkpoints, merit

CONFIG = "config.resolved.toml"


class NoCheckpoint(QuartetError, ValueError):
    """A run does not have a checkpoint of this name, or it cannot be read."""


def with_weights(run: Path) -> list[Path]:
    """Return the checkpoints of a run that hold weights, the newest first."""
    stages = read_settings(run / CONFIG).config.stages
    order = {name: place for place, name in enumerate(stages)}
    paths = Checkpoints(run / "checkpoints", order).newest_first()
    return [path for path in paths if not path.name.endswith("-000000")]


def checkpoint_path(run: Path, name: str) -> Path:
    """Return the checkpoint of this name, such as ppo-000060; for a number the newest of that step;
    for "best" the one with the highest metric of `run.keep_best`. Raises NoCheckpoint."""
    paths = with_weights(run)
    if name == "best":
        measured = [path for path in paths if merit(path) is not None]
        if not measured:
            raise NoCheckpoint(
                f"{run}: no checkpoint was measured. Runs with run.keep_best measure them."
            )
        return max(measured, key=lambda path: merit(path) or 0.0)
    ends = f"-{int(name):06d}" if name.isascii() and name.isdecimal() else None
    for path in paths:
        if path.name == name or (ends is not None and path.name.endswith(ends)):
            return path
    names = ", ".join(path.name for path in paths) or "none"
    raise NoCheckpoint(f"{run}: has no checkpoint {name}. There are {names}.")


def _no_scores(responses: Sequence[str]) -> list[None]:
    """Stand in for a reward that was given as a Python object: no response has a score."""
    return [None] * len(responses)


def write_models(run: Path, path: Path, scratch: Path) -> None:
    """Write the models of the checkpoint in `path` to the folder `scratch`, as its stage would have
    written them if it had ended there. Raises a QuartetError if that cannot be done."""
    config = read_settings(run / CONFIG).config
    try:
        checkpoint = read_checkpoint(path)
    except DamagedCheckpoint as error:
        raise NoCheckpoint(f"{path}: {error}.") from None
    facts, given = checkpoint.facts, [r for r in config.reward if isinstance(r, ObjectSource)]
    objects = {source.object: _no_scores for source in given}  # nothing is trained here
    assembler = Assembler(config, facts["fault"], objects=objects)
    models_at(stage(assembler, facts["stage"]), run, checkpoint, scratch)
    shutil.copyfile(run / CONFIG, scratch / CONFIG)
    write_cards(scratch, f"{run.resolve().name} at {path.name}")
