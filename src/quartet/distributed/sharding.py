"""Tensors of which each rank may hold a part (torch's DTensor), and how they are put together.

Every function takes plain tensors as well. Those that put a tensor together are collective: every
rank must call them, in the same order.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quartet.tensors import Tensor, torch


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor. (Importing that class to ask takes a second.)"""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or a plain tensor itself."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, or a plain tensor itself. Every rank must call it."""
    everything: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return everything


def with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """Return a sharded tensor like `tensor` with `part` as this rank's part, which stays on the
    device that it is on (`DTensor.from_local` would move it to the mesh's), in the memory that it
    is in."""
    from torch.utils._python_dispatch import transform_subclass

    whole: Tensor = transform_subclass(
        tensor.detach(), lambda _, inner: part if isinstance(inner, torch.Tensor) else inner
    )
    return whole


def has_even_parts(tensor: Tensor) -> bool:
    """Return whether every rank holds as many rows of a sharded tensor. Where not, FSDP pads the
    parts of a block: it copies them whenever they are replaced."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return tensor.shape[0] % int(mesh.size(mesh.ndim - 1)) == 0


def is_first_replica(tensor: Tensor) -> bool:
    """Return whether this rank's part of a sharded tensor is the copy to write and to count.

    With `launch.shard` below the number of ranks, several rows of ranks hold the same parts: the
    first row's parts count.
    """
    return not any(tensor.device_mesh.get_coordinate()[:-1])  # type: ignore[attr-defined]


class GatheredWeights(Mapping[str, Tensor]):
    """The weights of a model by name, each put together when it is read.

    Only one whole tensor need fit into memory at a time. Every rank must read the same names in the
    same order.
    """

    def __init__(self, model: Any, replacements: Mapping[str, Tensor] | None = None) -> None:
        """`replacements` are tensors that stand in for parameters, by parameter name."""
        instead = (
            {id(p): replacements[n] for n, p in model.named_parameters() if n in replacements}
            if replacements
            else {}
        )
        self.held = {
            name: instead.get(id(t), t) for name, t in model.state_dict(keep_vars=True).items()
        }

    def only(self, wanted: Callable[[str], bool]) -> "GatheredWeights":
        """Return the weights whose names are `wanted`."""
        subset = copy.copy(self)
        subset.held = {name: tensor for name, tensor in self.held.items() if wanted(name)}
        return subset

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return full_tensor(self.held[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def full_state_dict(
    model: Any, replacements: Mapping[str, Tensor] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """Return all weights of a model, as `gather_weights` does. Every rank must call it."""
    return gather_weights(GatheredWeights(model, replacements), keep)


def gather_weights(weights: GatheredWeights, keep: bool = True) -> dict[str, Tensor]:
    """Return all weights at once, those that were sharded on the CPU. Every rank must call it.

    A tensor with two names (a tied embedding) is put together once and stays one tensor. With
    `keep=False` this rank only takes part, and gets an empty dictionary.
    """
    state, first_names = dict[str, Tensor](), dict[int, str]()
    for name, held in weights.held.items():
        if (first_name := first_names.setdefault(id(held), name)) != name:
            state[name] = state[first_name]
            continue
        tensor = weights[name].cpu() if is_sharded(held) else weights[name]
        state[name] = tensor if keep else torch.empty(0)
    return state if keep else {}


COPIED_AT_ONCE = 2**24
"""How many numbers are copied together out of a file."""


def copy_saved(target: Tensor, saved: Any) -> Tensor:
    """Copy a saved value into a tensor and return that tensor.

    `saved` is a whole tensor, or an object that has its shape and gives rows of it by slices. A
    sharded target takes its own rows only. Raises ValueError where the shapes differ.
    """
    if saved.shape != target.shape:
        raise ValueError(f"a tensor {list(saved.shape)} was saved for one {list(target.shape)}")
    own, first = local_tensor(target), 0
    if is_sharded(target):
        # FSDP cuts the first dimension into equal parts, rounded up: the last ranks may get less.
        mesh = target.device_mesh  # type: ignore[attr-defined]
        rows_per_rank = -(-target.shape[0] // mesh.size(mesh.ndim - 1))
        first = min(rows_per_rank * mesh.get_coordinate()[-1], target.shape[0])
    if own.dim() == 0:
        own.copy_(saved if isinstance(saved, torch.Tensor) else saved[:])
        return target
    # A few rows at a time: what is read of a file counts as memory of the process meanwhile.
    at_once = max(COPIED_AT_ONCE * len(own) // max(own.numel(), 1), 1)
    for start in range(0, len(own), at_once):
        part = own[start : start + at_once]
        part.copy_(saved[first + start : first + start + len(part)])
    return target
