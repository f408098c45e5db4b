"""One checkpoint: a folder that is complete or absent.

`state.json` holds the facts of the checkpoint and its state, with references to tensors
(`state_tree.py`); `manifest.json`, written last, holds the size and SHA-256 of every file. A folder
with another name is written and synced first, and then renamed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from quartet.errors import QuartetError
from quartet.files import (
    UNFINISHED,
    difference,
    fingerprints,
    move,
    read_json,
    remove_folder,
    sync,
    write,
)
from quartet.tensors import is_finite
from quartet.training.state_tree import (
    SHARD,
    SHARDED,
    SHARDS,
    TENSOR,
    TENSORS,
    Tree,
    join_tensors,
    save_tensors,
    tensor_names,
)

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1


class DamagedCheckpoint(QuartetError, ValueError):
    """A checkpoint that is not as it was written; the message says what is wrong with it."""


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Table(BaseModel):
    """A table in a checkpoint's JSON. Nothing is converted: a number in quotes is an error."""

    model_config = ConfigDict(strict=True, frozen=True)


class Fingerprint(_Table):
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Table):
    format: int
    files: dict[str, Fingerprint]


class Named(_Table):
    """The facts that name a checkpoint and its folder."""

    stage: str
    step: Count


class Facts(Named):
    """The facts of a run's checkpoint: what the run was, and had written, at that step."""

    events: Fingerprint
    results: dict[str, Fingerprint]
    steps: dict[str, Count]
    merit: Annotated[float, Field(allow_inf_nan=False)] | None
    config: dict[str, Any]
    data: dict[str, str]
    fault: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified."""

    path: Path
    facts: Mapping[str, Any]
    """The stage, the step and what else the writer gave."""
    tree: Tree
    files: frozenset[str]
    """The files that its manifest lists; no other file is read."""

    @property
    def name(self) -> str:
        return self.path.name

    def state(self) -> Tree:
        """Return the state with its tensors, read from the disk."""
        tensors = load_file(self.path / TENSORS) if TENSORS in self.files else {}
        return join_tensors(
            self.tree,
            tensors,
            [self.path / name for name in sorted(self.files) if SHARDS.fullmatch(name)],
        )


def write_checkpoint(
    folder: Path, state: Tree | Callable[[Path], Any], facts: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and return its folder. Where that fails, nothing is left of the attempt.

    `state` is the state, or a function that writes the state's tensors into a folder, as
    `save_tensors` does, and returns the rest.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        unfinished.mkdir(parents=True)
        tree = state(unfinished) if callable(state) else save_tensors(unfinished, state)
        write(unfinished / STATE, json.dumps({"facts": facts, "state": tree}))
        manifest = {"format": FORMAT, "files": fingerprints(unfinished, unfinished)}
        write(unfinished / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        sync(unfinished)
        if folder.exists():  # an earlier attempt of this run at this step
            remove_folder(folder)
        move(unfinished, folder)
    except (Exception, KeyboardInterrupt):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify it: all bytes against the manifest, the files against the state,
    the name in the facts against the folder's. Raises `DamagedCheckpoint`.
    """
    try:
        table = read_json(folder / MANIFEST)
        if (
            isinstance(table, dict)
            and isinstance(table.get("format"), int)
            and table["format"] != FORMAT
        ):
            raise DamagedCheckpoint(
                f"is of format {table['format']}, this Quartet reads format {FORMAT}"
            )
        files = Manifest.model_validate(table).model_dump()["files"]
        if STATE not in files:
            raise DamagedCheckpoint(f"its manifest does not list {STATE}")
        if wrong := difference(folder, files) or _unlisted(folder, files):
            raise DamagedCheckpoint(wrong)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, DamagedCheckpoint)
            else DamagedCheckpoint("its manifest cannot be read")
        ) from None
    try:
        inner = read_json(folder / STATE)
        facts, tree = inner["facts"], inner["state"]
        named = Named.model_validate(facts)
        if folder.name != (name := f"{named.stage}-{named.step:06d}"):
            raise DamagedCheckpoint(f"holds {name}, which is not what its folder is called")
        _check_tensors(folder, files, tree)
    except ValidationError as error:
        raise DamagedCheckpoint(
            f"its facts are not those of a checkpoint: {first_problem(error)}"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{STATE} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        raise DamagedCheckpoint(f"its tensors cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise (
            error
            if isinstance(error, DamagedCheckpoint)
            else DamagedCheckpoint(f"{STATE} is not that of a checkpoint")
        ) from None
    return Checkpoint(folder, facts, tree, frozenset(files))


def misfit(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint lacks for a run to go on from it, None where it lacks nothing."""
    try:
        facts = Facts.model_validate(checkpoint.facts)
    except ValidationError as error:
        return f"its facts are not those of a run's checkpoint: {first_problem(error)}"
    needed = {"random", "work"} if facts.step else {"random"}
    if not isinstance(checkpoint.tree, dict) or checkpoint.tree.keys() != needed:
        return (
            f"its state does not have what step {facts.step} needs: {' and '.join(sorted(needed))}"
        )
    return None


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic reports, with its place, in one short phrase."""
    [problem, *_] = error.errors()
    place = ".".join(str(step) for step in problem["loc"]) or "all of it"
    return f"{place[:100]}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _unlisted(folder: Path, files: Mapping[str, Any]) -> str | None:
    """Return what is wrong where a file of tensors or state is not in the manifest."""
    names = sorted(path.name for path in folder.iterdir())
    unlisted = next(
        (n for n in names if (n in {STATE, TENSORS} or SHARDS.fullmatch(n)) and n not in files),
        None,
    )
    return None if unlisted is None else f"its manifest does not list {unlisted}"


def _check_tensors(folder: Path, files: Mapping[str, Any], tree: Tree) -> None:
    """Raise `DamagedCheckpoint` unless the files hold exactly the tensors that the state refers to,
    and all their numbers are finite."""
    whole, sharded = set(tensor_names(tree, TENSOR)), set(tensor_names(tree, SHARDED))
    shards = [name for name in files if SHARDS.fullmatch(name)]
    for name, expected in {TENSORS: whole, **dict.fromkeys(shards, sharded)}.items():
        stored: set[str] = set()
        if name in files:
            with safe_open(folder / name, "pt") as opened:
                stored = set(opened.keys())
                for tensor in stored:
                    numbers = opened.get_tensor(tensor)
                    if not is_finite(numbers):
                        raise DamagedCheckpoint(f"{tensor} in {name} is not finite")
        if odd := sorted(stored ^ expected):
            problem = (
                f"has {odd[0]}, which its state does not name"
                if odd[0] in stored
                else f"lacks {odd[0]}, which its state names"
            )
            raise DamagedCheckpoint(f"{name} {problem}")
    if sharded and not shards:
        raise DamagedCheckpoint(f"{SHARD.format(0)} is not there, and the state has tensors in it")
