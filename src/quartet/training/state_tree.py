"""The state of a run as a tree, and its tensors as files.

A state is a tree of dictionaries and lists whose leaves are tensors, numbers, texts and plain
records. In a checkpoint the tensors are in safetensors files, and the rest is JSON with a reference
in the place of each tensor. A sharded tensor is written in parts, a file per rank; any number of
ranks can read it again.
"""

import dataclasses
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quartet.distributed.offload import MAIN_MEMORY
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import is_first_replica, is_sharded, local_tensor
from quartet.errors import NonFinite
from quartet.files import readable_weights, sync
from quartet.io.activity import writing
from quartet.tensors import Tensor, is_finite

Tree = Any
"""Dictionaries by name and lists of trees; tensors, numbers, texts, truth values and None."""

TENSORS = "state.safetensors"
SHARD = "shard-{:05d}.safetensors"
SHARDS = re.compile(r"shard-\d{5}\.safetensors")
TENSOR, SHARDED = "$tensor", "$sharded"
"""The keys of a reference: `{"$tensor": name}` is in the file of tensors, `{"$sharded": name}` in
the files of shards."""


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint saves and restores."""

    def state(self) -> Tree:
        """Return the present state. Its tensors may be the live ones, which later steps change."""
        ...

    def load_state(self, state: Tree) -> None: ...


class ShardedRows:
    """A tensor that is stored by rows in several files. Slices read only the rows they need."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """`files` hold the tensor's parts under `name`, in the order of its rows."""
        self.name, self.files = name, files
        self.shapes: list[list[int]] = [self._read(file, _shape) for file in files]
        self.shape = torch.Size([sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]])

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts, before = [], 0
        for file, (size, *_) in zip(self.files, self.shapes, strict=True):
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                parts.append(self._read(file, itemgetter(slice(first, last))))
            before += size
        return torch.cat(parts) if parts else torch.empty(0, *self.shape[1:])

    def _read(self, file: Path, read: Callable[[Any], Any]) -> Any:
        with safe_open(file, "pt") as opened:
            return read(opened.get_slice(self.name))


def _shape(part: Any) -> list[int]:
    return list(part.get_shape())


def save_tensors(folder: Path, state: Tree, process_group: ProcessGroup = SINGLE_PROCESS) -> Any:
    """Write the tensors of a state into a folder, and return the rest of the state, JSON-ready.

    Rank 0 writes the whole tensors, and every rank its parts of the sharded ones. Raises
    `NonFinite` where a number is not finite: no run can go on from such a state.
    """
    tree, tensors = split_tensors(state)
    for name, tensor in tensors.items():
        if not is_finite(local_tensor(tensor)):
            raise NonFinite(f"the checkpoint's {name}")
    whole = {name: t for name, t in tensors.items() if not is_sharded(t)}
    parts = {
        name: local_tensor(t).contiguous()
        for name, t in tensors.items()
        if is_sharded(t) and is_first_replica(t)
    }
    if whole and process_group.is_rank_zero:
        _save_file(whole, folder / TENSORS)
    if parts:
        _save_file(parts, folder / SHARD.format(process_group.rank))
    return tree


def _save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a file and wait until they are on the disk."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with writing("checkpoint", path, num_bytes):
            save_file({name: tensor.to(MAIN_MEMORY) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # A full disk is reported as text: raise the operating system's error that it names.
        reason = re.search(r"I/O error: (.*?)( \(os error (\d+)\))?$", str(error))
        if reason is None:
            raise
        raise OSError(int(reason[3] or errno.EIO), reason[1], str(path)) from error
    readable_weights(path)
    sync(path)


def split_tensors(state: Tree) -> tuple[Any, dict[str, Tensor]]:
    """Return the state with a reference in the place of each tensor, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def without_tensors(tree: Tree, path: str) -> Any:
        if isinstance(tree, torch.Tensor):
            tensors[path] = tree.detach() if is_sharded(tree) else tree.detach().contiguous()
            return {SHARDED if is_sharded(tree) else TENSOR: path}
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            return dataclasses.asdict(tree)
        if isinstance(tree, Mapping):
            return {
                key: without_tensors(value, f"{path}/{key}" if path else str(key))
                for key, value in tree.items()
            }
        if isinstance(tree, list | tuple):
            return [without_tensors(value, f"{path}/{i}") for i, value in enumerate(tree)]
        return tree

    return without_tensors(state, ""), tensors


def join_tensors(tree: Any, tensors: Mapping[str, Tensor], shards: Sequence[Path] = ()) -> Tree:
    """Return the state that `split_tensors` took apart. A sharded tensor is a `ShardedRows` of the
    files in `shards`."""
    if isinstance(tree, dict):
        if set(tree) == {TENSOR}:
            return tensors[tree[TENSOR]]
        if set(tree) == {SHARDED}:
            return ShardedRows(tree[SHARDED], shards)
        return {key: join_tensors(value, tensors, shards) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join_tensors(value, tensors, shards) for value in tree]
    return tree


def tensor_names(tree: Tree, kind: str) -> Iterator[str]:
    """Yield the names in a state's references of one kind, `TENSOR` or `SHARDED`. Raises ValueError
    where a reference is malformed."""
    if isinstance(tree, dict):
        if kind in tree:
            if len(tree) != 1 or not isinstance(tree[kind], str):
                raise ValueError(f"{kind} is no name")
            yield tree[kind]
        for value in tree.values():
            yield from tensor_names(value, kind)
    elif isinstance(tree, list):
        for value in tree:
            yield from tensor_names(value, kind)
