"""Which checkpoint a run goes on from, and whether the config still fits it."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files as durable
from quartet.config.errors import toml_value
from quartet.config.read_by import changes_what_is_learnt, roles_that_read
from quartet.config.tables import Config
from quartet.errors import QuartetError
from quartet.stages.kinds import kind_of
from quartet.training.checkpoint import Checkpoint, misfit
from quartet.training.checkpoints import Checkpoints

RECORD = "events.jsonl"


class CannotResume(QuartetError, ValueError):
    """The message says why, and what to do."""


@dataclass(frozen=True)
class Choice:
    """Where a run goes on."""

    checkpoint: Checkpoint
    skipped: Sequence[tuple[Path, str]]
    """Newer ones that cannot be used, and why."""
    accepted: Sequence[str]
    """What is no longer as it was, a sentence each."""

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Why which was skipped, by name."""
        return ((path.name, reason) for path, reason in self.skipped)


def find_run(root: Path, name: str) -> Path | None:
    """The newest run folder of this name."""
    found = [
        p
        for p in root.glob("*")
        if not p.is_symlink() and re.fullmatch(rf"\d{{4}}-\d{{4}}-{re.escape(name)}(-\d+)?", p.name)
    ]
    return max(
        (p for p in found if (p / RECORD).is_file()),
        key=lambda p: (p / RECORD).stat().st_mtime,
        default=None,
    )


def has_begun(folder: Path) -> bool:
    """Whether a step was ever taken, or a checkpoint written."""
    events = (folder / RECORD).read_text(encoding="utf-8", errors="replace")
    return any((folder / "checkpoints").glob("[!.]*")) or '"event": "metrics"' in events


def choose(
    folder: Path, config: Config, made_with: Mapping[str, Any], accept: Sequence[str]
) -> Choice:
    """The newest checkpoint that is as it was written and fits the config. `made_with`: what
    `Saving.made_with` would be now. Raises `CannotResume` where there is none, or where what cannot
    change has changed."""
    steps = steps_of(config)
    skipped: list[tuple[Path, str]] = []

    def fits(found: Checkpoint) -> str | None:
        if wrong := misfit(found):
            return wrong
        if list(config.recipe[: len(found.facts["steps"])]) != list(found.facts["steps"]):
            return "the recipe's stages before it are others now"
        for stage, count in found.facts["steps"].items():
            if steps.get(stage, count) != count:
                return f"{stage} had {count:,} steps when it was made, and has {steps[stage]:,} now"
        return durable.difference(folder, found.facts["results"])

    for path, found in Checkpoints(
        folder / "checkpoints", {name: i for i, name in enumerate(config.recipe)}
    ).usable(fits):
        if isinstance(found, str):
            skipped.append((path, found))
            continue
        return Choice(found, skipped, list(_checked(folder, found, config, made_with, accept)))
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped) or "there are none"
    raise CannotResume(
        f"{folder}: no checkpoint can be used ({reasons}). Nothing was changed. Start anew without "
        f"--resume."
    )


def set_aside(skipped: Sequence[tuple[Path, str]]) -> None:
    """Under another name, so that nobody takes them for the newest again; nothing is deleted."""
    for path, _ in skipped:
        path.rename(
            next(
                p
                for i in range(1, 10**6)
                if not (p := path.with_name(f"{path.name}.skipped-{i}")).exists()
            )
        )


def setting(config: Config, key: str) -> Any:
    """Return the value of a dotted key, such as "sft.steps"."""
    return functools.reduce(getattr, key.split("."), config)


def steps_of(config: Config) -> dict[str, int]:
    """Return how many steps each stage of the recipe has, of those whose number is a setting."""
    kinds = {stage: kind_of(stage) for stage in config.recipe}
    return {
        stage: setting(config, kind.steps)
        for stage, kind in kinds.items()
        if kind is not None and kind.steps is not None
    }


def _checked(
    folder: Path,
    found: Checkpoint,
    config: Config,
    made_with: Mapping[str, Any],
    accept: Sequence[str],
) -> Iterator[str]:
    """Sentences on differences that were accepted; raises on the others, all at once."""
    refused = []
    for key, was, undo in _differences(folder, found, config, made_with):
        sentence = f"checkpoint {found.name} was made with {was}."
        if key in accept:
            yield f"{sentence} Accepted."
        else:
            refused.append(f"{sentence} Pass --accept {key}, or {undo}.")
    if refused:
        raise CannotResume("\n".join(refused))
    done, length = found.facts["step"], steps_of(config).get(found.facts["stage"], 0)
    if done > length > 0:
        raise CannotResume(
            f"{found.facts['stage']} has done {done:,} steps already, and the config asks for "
            f"{length:,}."
        )


def _differences(
    folder: Path, found: Checkpoint, config: Config, made_with: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """What differs by its key, how it was then, and how to undo it; only of what the checkpoint's
    past depends on."""
    then, now = (dict(leaves(side["config"])) for side in (found.facts, made_with))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key) and _shaped_the_past(key, found, config):
            before, after = (
                toml_value(side[key]) if key in side else "not set" for side in (then, now)
            )
            yield key, f"{key} = {before}, the config says {after}", "change it back"
    for path in sorted(found.facts["data"].keys() | made_with["data"].keys()):
        if found.facts["data"].get(path) != made_with["data"].get(path):
            yield path, f"other contents of {path}", "put the old file back"
    if found.facts["fault"] != made_with["fault"]:
        said = "no --break" if found.facts["fault"] is None else f"--break {found.facts['fault']}"
        yield "break", said, "say the same again"
    record = found.facts["events"]
    if durable.fingerprint(folder / RECORD, record["size"]) != record:
        yield (
            RECORD,
            f"another {RECORD}: it was changed or cut short since",
            "put the old file back",
        )


def _shaped_the_past(key: str, found: Checkpoint, config: Config) -> bool:
    """Return whether the steps before the checkpoint would have been others with another value."""
    if not changes_what_is_learnt(key):
        return False
    if roles_that_read(key) is None:
        return True
    stage, step = found.facts["stage"], found.facts["step"]
    past = config.recipe[: config.recipe.index(stage) + (step > 0)]
    kind = kind_of(stage)
    if stage in past and kind is not None and kind.steps == key and kind.schedule is not None:
        # More steps of the same, unless the learning rate falls towards the last of them.
        return bool(setting(config, kind.schedule) != "constant")
    return not set(config.readers(key)).isdisjoint(past)


def leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list is a value, unless it is one of tables."""
    if isinstance(table, Mapping):
        items = list(table.items())
    elif isinstance(table, list) and table and isinstance(table[0], Mapping):
        items = list(enumerate(table))
    else:
        yield prefix, table
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
