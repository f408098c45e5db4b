"""Checkpoints: everything that a stage changes as it goes on, in folders that are whole or not
there.

A state is a tree of dictionaries and lists with tensors, numbers, texts and plain records for
leaves. On disk it is JSON and safetensors; a manifest, written last, has their sizes and SHA-256.
The folder gets its name when all are on the disk. Tensors that ranks hold in parts are written in
parts, a file per rank, and read by however many ranks there are then.
"""

import dataclasses
import errno
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import is_first_replica, is_sharded, local_tensor
from quartet.errors import NonFinite, QuartetError
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
from quartet.tensors import Tensor

Tree = Any
"""Dictionaries by name and lists of trees; tensors, numbers, texts, truth values and None."""

STATE, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"
SHARD = "shard-{:05d}.safetensors"
SHARDS = re.compile(r"shard-\d{5}\.safetensors")
FORMAT = 1
TENSOR, SHARDED = "$tensor", "$sharded"


@runtime_checkable
class Stateful(Protocol):
    def state(self) -> Tree:
        """What it is now. Tensors in it may be the live ones: they are read before anything goes
        on."""
        ...

    def load_state(self, state: Tree) -> None: ...


class DamagedCheckpoint(QuartetError, ValueError):
    """A checkpoint that is not what was written; the message says in what."""


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Table(BaseModel):
    """A table in a checkpoint's JSON; numbers are numbers and texts are texts."""

    model_config = ConfigDict(strict=True, frozen=True)


class Fingerprint(_Table):
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Table):
    format: int
    files: dict[str, Fingerprint]


class Named(_Table):
    """What every checkpoint says of itself, and what its folder is called after."""

    stage: str
    step: Count


class Facts(Named):
    """What a run's checkpoint is a checkpoint of."""

    events: Fingerprint
    results: dict[str, Fingerprint]
    steps: dict[str, Count]
    merit: Annotated[float, Field(allow_inf_nan=False)] | None
    config: dict[str, Any]
    data: dict[str, str]
    fault: str | None


@dataclass(frozen=True)
class Checkpoint:
    """One that is as it was written."""

    path: Path
    facts: Mapping[str, Any]
    """What it is a checkpoint of."""
    tree: Tree
    files: frozenset[str]
    """Those that its manifest lists; no other is read."""

    @property
    def name(self) -> str:
        return self.path.name

    def state(self) -> Tree:
        tensors = load_file(self.path / TENSORS) if TENSORS in self.files else {}
        return joined(
            self.tree,
            tensors,
            [self.path / name for name in sorted(self.files) if SHARDS.fullmatch(name)],
        )


class Parts:
    """A tensor that lies in several files, by rows."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, files
        self.shapes: list[list[int]] = [self._of(file, _shape) for file in files]
        self.shape = torch.Size([sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]])

    def __getitem__(self, rows: slice) -> Tensor:
        """Only what is asked for is read."""
        start, stop, _ = rows.indices(self.shape[0])
        found, before = [], 0
        for file, (size, *_) in zip(self.files, self.shapes, strict=True):
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                found.append(self._of(file, itemgetter(slice(first, last))))
            before += size
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:])

    def _of(self, file: Path, ask: Callable[[Any], Any]) -> Any:
        with safe_open(file, "pt") as opened:
            return ask(opened.get_slice(self.name))


def _shape(part: Any) -> list[int]:
    return list(part.get_shape())


def keep_tensors(folder: Path, state: Tree, process_group: ProcessGroup = SINGLE_PROCESS) -> Any:
    """Write the tensors of a state into a folder, every rank its own parts, the lead what all have;
    the rest of the state, with a name in the place of each. Raises `NonFinite` where a number is
    not finite: what cannot go on is not kept."""
    tree, tensors = parted(state)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(local_tensor(tensor).isfinite().all()):
            raise NonFinite(f"the checkpoint's {name}")
    files = {
        TENSORS: {name: t for name, t in tensors.items() if not is_sharded(t)}
        if process_group.is_rank_zero
        else {}
    }
    files[SHARD.format(process_group.rank)] = {
        n: local_tensor(t).contiguous()
        for n, t in tensors.items()
        if is_sharded(t) and is_first_replica(t)
    }
    for file, held in files.items():
        if held:
            try:
                save_file(held, folder / file)
            except SafetensorError as error:  # the operating system's own error, in its words
                reason = re.search(r"I/O error: (.*?)( \(os error (\d+)\))?$", str(error))
                if reason is None:
                    raise
                raise OSError(int(reason[3] or errno.EIO), reason[1], str(folder / file)) from error
            sync(folder / file)
    return tree


def write_checkpoint(
    folder: Path, state: Tree | Callable[[Path], Any], facts: Mapping[str, Any]
) -> Path:
    """Write a new folder. `state`: what is kept, or what writes the tensors of it into a folder and
    returns the rest. Where it cannot be written, nothing is left of the attempt."""
    beside = folder.with_name(f".{folder.name}{UNFINISHED}")
    if beside.exists():
        shutil.rmtree(beside)
    try:
        beside.mkdir(parents=True)
        tree = state(beside) if callable(state) else keep_tensors(beside, state)
        write(beside / STATE, json.dumps({"facts": facts, "state": tree}))
        manifest = {"format": FORMAT, "files": fingerprints(beside, beside)}
        write(beside / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        sync(beside)
        if folder.exists():  # what is left of an earlier attempt at this step
            remove_folder(folder)
        move(beside, folder)
    except (Exception, KeyboardInterrupt):
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify it: every byte against the manifest, the manifest against what
    the state needs, the state's name against the folder's. Raises `DamagedCheckpoint`."""
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


def misfit(found: Checkpoint) -> str | None:
    """Return what a checkpoint lacks for a run to go on from it, None where it lacks nothing."""
    try:
        facts = Facts.model_validate(found.facts)
    except ValidationError as error:
        return f"its facts are not those of a run's checkpoint: {first_problem(error)}"
    needed = {"random", "work"} if facts.step else {"random"}
    if not isinstance(found.tree, dict) or found.tree.keys() != needed:
        return (
            f"its state does not have what step {facts.step} needs: {' and '.join(sorted(needed))}"
        )
    return None


def first_problem(error: ValidationError) -> str:
    """Return the first thing that pydantic found, with its place, in short."""
    [problem, *_] = error.errors()
    place = ".".join(str(step) for step in problem["loc"]) or "all of it"
    return f"{place[:100]}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _unlisted(folder: Path, files: Mapping[str, Any]) -> str | None:
    """A file of tensors or states that is there and not in the manifest."""
    names = sorted(path.name for path in folder.iterdir())
    strange = next(
        (n for n in names if (n in {STATE, TENSORS} or SHARDS.fullmatch(n)) and n not in files),
        None,
    )
    return None if strange is None else f"its manifest does not list {strange}"


def _check_tensors(folder: Path, files: Mapping[str, Any], tree: Tree) -> None:
    """The files of tensors have those that the state names, no other ones, and all numbers in them
    are finite."""
    full_tensor, sharded = set(_tensor_names(tree, TENSOR)), set(_tensor_names(tree, SHARDED))
    shards = [name for name in files if SHARDS.fullmatch(name)]
    for name, expected in {TENSORS: full_tensor, **dict.fromkeys(shards, sharded)}.items():
        stored: set[str] = set()
        if name in files:
            with safe_open(folder / name, "pt") as opened:
                stored = set(opened.keys())
                for tensor in stored:
                    numbers = opened.get_tensor(tensor)
                    if numbers.is_floating_point() and not bool(numbers.isfinite().all()):
                        raise DamagedCheckpoint(f"{tensor} in {name} is not finite")
        if odd := sorted(stored ^ expected):
            told = (
                f"has {odd[0]}, which its state does not name"
                if odd[0] in stored
                else f"lacks {odd[0]}, which its state names"
            )
            raise DamagedCheckpoint(f"{name} {told}")
    if sharded and not shards:
        raise DamagedCheckpoint(f"{SHARD.format(0)} is not there, and the state has tensors in it")


def _tensor_names(tree: Tree, mark: str) -> Iterator[str]:
    """The tensors that a state refers to. Raises ValueError where a reference is none."""
    if isinstance(tree, dict):
        if mark in tree:
            if len(tree) != 1 or not isinstance(tree[mark], str):
                raise ValueError(f"{mark} is no name")
            yield tree[mark]
        for value in tree.values():
            yield from _tensor_names(value, mark)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tensor_names(value, mark)


def parted(state: Tree) -> tuple[Any, dict[str, Tensor]]:
    """The state with a name in the place of each tensor, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def name_tensors(tree: Tree, path: str) -> Any:
        if isinstance(tree, torch.Tensor):
            tensors[path] = tree.detach() if is_sharded(tree) else tree.detach().contiguous()
            return {SHARDED if is_sharded(tree) else TENSOR: path}
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            return dataclasses.asdict(tree)
        if isinstance(tree, Mapping):
            return {
                key: name_tensors(value, f"{path}/{key}" if path else str(key))
                for key, value in tree.items()
            }
        if isinstance(tree, list | tuple):
            return [name_tensors(value, f"{path}/{i}") for i, value in enumerate(tree)]
        return tree

    return name_tensors(state, ""), tensors


def joined(tree: Any, tensors: Mapping[str, Tensor], shards: Sequence[Path] = ()) -> Tree:
    """The state again; what lies in shards is a `Parts`."""
    if isinstance(tree, dict):
        if set(tree) == {TENSOR}:
            return tensors[tree[TENSOR]]
        if set(tree) == {SHARDED}:
            return Parts(tree[SHARDED], shards)
        return {key: joined(value, tensors, shards) for key, value in tree.items()}
    return [joined(value, tensors, shards) for value in tree] if isinstance(tree, list) else tree


class Checkpoints:
    """The checkpoints of a run: `checkpoints/ppo-000060`. Those of step 0 hold no weights, only the
    place where a stage begins; they are all kept."""

    def __init__(
        self, folder: Path, stages: Mapping[str, int], keep_last: int = 2, keep_best: bool = False
    ) -> None:
        """`stages`: their names, and their places in the order in which they run."""
        self.folder, self.stages, self.keep_last, self.keep_best = (
            folder,
            stages,
            keep_last,
            keep_best,
        )

    def write(
        self, stage: str, step: int, state: Tree | Callable[[Path], Any], facts: Mapping[str, Any]
    ) -> Path:
        """Older ones go only when this one is safe."""
        written = write_checkpoint(
            self.folder / f"{stage}-{step:06d}", state, {"stage": stage, "step": step, **facts}
        )
        if step:
            for folder in self.superfluous():
                remove_folder(folder)
        return written

    def superfluous(self) -> list[Path]:
        """All with weights but the last, and the best."""
        full = [path for path in self.newest_first() if not path.name.endswith("-000000")]
        known = [path for path in full if merit(path) is not None]
        best = (
            max(known, key=lambda path: merit(path) or 0.0, default=None)
            if self.keep_best
            else None
        )
        return [path for path in full[self.keep_last :] if path != best]

    def newest_first(self) -> list[Path]:
        there = [
            (self._place(path.name), path) for path in self.folder.glob("*-[0-9]*") if path.is_dir()
        ]
        known = [(place, path) for place, path in there if place is not None]
        return [path for _, path in sorted(known, reverse=True)]

    def usable(
        self, fits: Callable[[Checkpoint], str | None]
    ) -> Iterator[tuple[Path, Checkpoint | str]]:
        """The newest first: each, or what is wrong with it. `fits`: what else may be wrong."""
        for path in self.newest_first():
            try:
                found = read_checkpoint(path)
            except DamagedCheckpoint as damage:
                yield path, str(damage)
                continue
            yield path, fits(found) or found

    def _place(self, name: str) -> tuple[int, int] | None:
        stage, _, step = name.rpartition("-")
        return (
            (self.stages[stage], int(step)) if stage in self.stages and step.isdecimal() else None
        )


def merit(folder: Path) -> float | None:
    """How good the stage was there, as far as it can be read."""
    try:
        found = read_json(folder / STATE)["facts"]["merit"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


class GlobalRandom:
    """The random numbers that nobody owns: a person's environment may draw them."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def state(self) -> Tree:
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": [
                kind,
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                position,
                has_gauss,
                gauss,
            ],
        }

    def load_state(self, state: Tree) -> None:
        torch.set_rng_state(state["torch"])
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(python_random(state["python"]))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def python_random(state: Tree) -> tuple[Any, ...]:
    """What `random.setstate` takes, from what JSON made of `random.getstate`."""
    version, keys, gauss = state
    return version, tuple(keys), gauss
