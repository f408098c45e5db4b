"""The checkpoint that a resumed run starts from, and whether the config still fits it."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files
from quartet.config.errors import toml_value
from quartet.config.read_by import changes_what_is_learnt, roles_that_read
from quartet.config.suggestions import known_keys
from quartet.config.tables import Config
from quartet.errors import QuartetError
from quartet.io.texts import did_you_mean, typed
from quartet.runs.folders import RECORD
from quartet.runs.rounds import round_of
from quartet.stages.kinds import CUSTOM, KINDS, RL, kind_of
from quartet.training.checkpoint import Checkpoint, misfit
from quartet.training.checkpoints import Checkpoints


class CannotResume(QuartetError, ValueError):
    """A run that cannot be resumed. The message says why, and what to do."""


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint that a resumed run starts from."""

    checkpoint: Checkpoint
    skipped: Sequence[tuple[Path, str]]
    """Newer checkpoints that cannot be used, each with the reason."""
    accepted: Sequence[str]
    """A sentence about each difference that the user accepted."""

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Return the name of each skipped checkpoint with the reason."""
        return ((path.name, reason) for path, reason in self.skipped)


def has_begun(folder: Path) -> bool:
    """Return whether the run took a step or wrote a checkpoint."""
    events = (folder / RECORD).read_text(encoding="utf-8", errors="replace")
    return any((folder / "checkpoints").glob("[!.]*")) or '"event": "metrics"' in events


def choose(
    folder: Path, config: Config, made_with: Mapping[str, Any], accept: Sequence[str]
) -> CheckpointChoice:
    """Return the newest checkpoint that is undamaged and fits the config, which is `Job.config`.

    `made_with` describes the run as it would be now, see `Saving.made_with`; `accept` has the keys
    of the differences that the user accepts. Raises `CannotResume` if there is no such checkpoint,
    or if a setting or file that shaped it has changed and is not in `accept`.
    """
    skipped: list[tuple[Path, str]] = []
    order = {name: place for place, name in enumerate(config.stages)}
    checkpoints = Checkpoints(folder / "checkpoints", order)
    for path, checkpoint in checkpoints.usable(lambda c: _unusable(c, folder, config)):
        if isinstance(checkpoint, str):
            skipped.append((path, checkpoint))
            continue
        accepted = list(_checked(folder, checkpoint, config, made_with, accept))
        return CheckpointChoice(checkpoint, skipped, accepted)
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped) or "there are none"
    raise CannotResume(
        f"{folder}: no checkpoint can be used ({reasons}). Nothing was changed. To start a new run "
        f"with its settings: quartet run {typed(folder / 'config.resolved.toml')}"
    )


def _unusable(checkpoint: Checkpoint, folder: Path, config: Config) -> str | None:
    """Return why a run of this config cannot start from the checkpoint; None if it can."""
    if problem := misfit(checkpoint):
        return problem
    past = checkpoint.facts["steps"]
    if list(config.stages[: len(past)]) != list(past):
        return "the recipe has other stages before it now"
    steps = steps_of(config)
    for stage, count in past.items():
        if steps.get(stage, count) != count:
            return f"{stage} had {count:,} steps when it was made, and has {steps[stage]:,} now"
    return files.difference(folder, checkpoint.facts["results"])


def set_aside(skipped: Sequence[tuple[Path, str]]) -> None:
    """Rename skipped checkpoints to `NAME.skipped-1`, `-2`, …, so that they no longer count as the
    newest. Nothing is deleted."""
    for path, _ in skipped:
        names = (path.with_name(f"{path.name}.skipped-{i}") for i in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def setting(config: Config, key: str) -> Any:
    """Return the value of a dotted key, such as "sft.steps"."""
    return functools.reduce(getattr, key.split("."), config)


def steps_of(config: Config) -> dict[str, int]:
    """Return the number of the last step of each stage of the run whose length is a setting; 0
    where its rows, which must be read first, say how many its epochs are. The RL stages of later
    rounds count on."""
    kinds = {stage: kind_of(stage) for stage in config.stages}
    return {
        stage: (setting(config, kind.steps) or 0) * (round_of(stage)[1] if kind is RL else 1)
        for stage, kind in kinds.items()
        if kind is not None and kind.steps is not None
    }


def _checked(
    folder: Path,
    checkpoint: Checkpoint,
    config: Config,
    made_with: Mapping[str, Any],
    accept: Sequence[str],
) -> Iterator[str]:
    """Yield a sentence for each accepted difference. Raises `CannotResume` with a sentence for each
    of the others, and if the stage has more steps behind it than the config has."""
    _check_keys(accept, checkpoint, made_with)
    refused = []
    for key, value_then, remedy in _differences(folder, checkpoint, config, made_with):
        sentence = f"checkpoint {checkpoint.name} was made with {value_then}."
        if key in accept:
            yield f"{sentence} Accepted."
        else:
            refused.append(f"{sentence} Pass --accept {key}, or {remedy}.")
    if refused:
        raise CannotResume("\n".join(refused))
    facts = checkpoint.facts
    num_done, num_steps = facts["step"], steps_of(config).get(facts["stage"], 0)
    kind = kind_of(facts["stage"])
    if kind is not None and num_done > num_steps > 0:
        raise CannotResume(
            f"{facts['stage']} has done {num_done:,} steps already, and the config asks for "
            f"{num_steps:,}. Set {kind.steps} to {num_done} or more, or start a "
            "new run."
        )


def _check_keys(
    accept: Sequence[str], checkpoint: Checkpoint, made_with: Mapping[str, Any]
) -> None:
    """Raise `CannotResume` for a key that names nothing that can differ."""
    facts = checkpoint.facts
    settings = dict(leaves(facts["config"])) | dict(leaves(made_with["config"]))
    files_read = facts["data"].keys() | made_with["data"].keys()
    known = settings.keys() | known_keys() | files_read | {"break", RECORD}
    for key in accept:
        if key not in known:
            raise CannotResume(
                f"--accept {key}: no such setting of this run.{did_you_mean(key, sorted(known))}"
            )


def _differences(
    folder: Path, checkpoint: Checkpoint, config: Config, made_with: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield what differs between the run now and the run that wrote the checkpoint, if it shaped
    the steps before the checkpoint: the key to accept it by, what it was, and how to undo it."""
    facts = checkpoint.facts
    yield from _changed_settings(checkpoint, config, made_with["config"])
    for path in sorted(facts["data"].keys() | made_with["data"].keys()):
        if facts["data"].get(path) != made_with["data"].get(path):
            yield path, f"other contents of {path}", "put the old file back"
    if facts["fault"] != made_with["fault"]:
        fault = facts["fault"]
        option, remedy = (
            ("no --break", "leave --break out")
            if fault is None
            else (f"--break {fault}", f"pass --break {fault}")
        )
        yield "break", option, remedy
    record = facts["events"]
    if files.fingerprint(folder / RECORD, record["size"]) != record:
        contents = f"another {RECORD}: it was changed or cut short since"
        yield RECORD, contents, "put the old file back"


ADDED_LATER: dict[str, Any] = {
    "run.precision": "fp32",
    "policy.resize_embeddings": False,
    "rollout.keep_mask": False,
    "rollout.min_new_tokens": 0,
    "rollout.stop": [],
    "algorithm.mask_truncated": False,
    "data.sampling.type": "every",
} | {
    f"{kind.optim}.{name}": value
    for name, value in {"optimizer": "adamw", "min_lr_ratio": 0.0, "warmup_ratio": 0.0}.items()
    for kind in KINDS
    if kind.optim is not None and kind is not CUSTOM
}
ADDED_LATER |= {
    f"{kind.optim}.{name}": value
    for name, value in {"eval_every": 0, "keep": "last", "patience": 0}.items()
    for kind in KINDS
    if kind.optim is not None and kind not in (RL, CUSTOM)
}
"""Settings that older checkpoints do not have, with the value that says what those versions did."""
ADDED_TO_PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("algorithm.advantage", "leave_one_out"): {"std": "none", "eps": 1e-6},
    ("algorithm.policy_loss", "sequence_clip"): {"ratio": "geometric_mean"},
    ("algorithm.correction", "truncated"): {"floor": 0.0},
    ("algorithm.correction", "sequence_truncated"): {"ratio": "geometric_mean"},
    ("algorithm.correction", "sequence_masked"): {"ratio": "product", "weight": "response"},
    ("preference.loss", "ipo"): {"per": "response"},
}
"""The same for fields of parts, by the part's place and type."""


def _changed_settings(
    checkpoint: Checkpoint, config: Config, settings: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the settings that changed; the triples are those of `_differences`."""
    then, now = with_later_keys(dict(leaves(checkpoint.facts["config"]))), dict(leaves(settings))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key) and _shaped_the_past(key, checkpoint, config):
            before, after = (
                toml_value(values[key]) if key in values else "not set" for values in (then, now)
            )
            yield key, f"{key} = {before}, the config says {after}", "change it back"


def with_later_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint with those that its version did not have."""
    later = dict(ADDED_LATER)
    for (part, kind), fields in ADDED_TO_PARTS.items():
        if settings.get(f"{part}.type") == kind:
            later |= {f"{part}.{name}": value for name, value in fields.items()}
    return later | settings


def _shaped_the_past(key: str, checkpoint: Checkpoint, config: Config) -> bool:
    """Return whether the steps before the checkpoint depend on the value of this setting."""
    if not changes_what_is_learnt(key):
        return False
    if roles_that_read(key) is None:
        return True
    stage, step = checkpoint.facts["stage"], checkpoint.facts["step"]
    past = config.stages[: config.stages.index(stage) + (step > 0)]
    kind = kind_of(stage)
    if stage in past and kind is not None and kind.steps == key and kind.optim is not None:
        # A new number of steps only adds steps, unless the learning rates depend on it.
        return bool(setting(config, kind.optim).depends_on_total)
    return not set(config.readers(key)).isdisjoint(past)


def leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of nested tables with its value. A list of tables counts as a table
    whose keys are 0, 1, …; any other list is a value."""
    if isinstance(table, Mapping):
        items = list(table.items())
    elif isinstance(table, list) and table and isinstance(table[0], Mapping):
        items = list(enumerate(table))
    else:
        yield prefix, table
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
