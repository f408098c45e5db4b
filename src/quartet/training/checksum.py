"""A number that shows whether the weights of a model have changed."""

from collections.abc import Iterable
from typing import Any

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import is_first_replica, is_sharded, local_tensor
from quartet.errors import StateMisfit
from quartet.models.adapters import AdapterView
from quartet.tensors import Int, Tensor

PIECE = 2**16
"""How many numbers are summed at once on a CPU: what a sum copies stays in the cache. Pieces of
2²² took seven times as long."""


class ReferenceChecksum:
    """The checksum of the reference that a stage began with: part of a checkpoint, so that a run
    goes on with the same one only."""

    def __init__(self, reference: Any | None, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Every rank must make it. `reference` is None in a stage without one."""
        self.reference, self.process_group = reference, process_group
        self.value = self.now()

    def now(self) -> int | None:
        """Return the checksum of the weights as they are. Every rank must call it."""
        if self.reference is None:
            return None
        return parameter_checksum(self.reference, self.process_group)

    def state(self) -> int | None:
        return self.value

    def load_state(self, state: object) -> None:
        """Raises `StateMisfit` where the checkpoint is one of a run with another reference."""
        if self.value != state and self._with_other_adapters() != state:
            raise StateMisfit(
                "the reference is not the model that the run began with",
                "put back the model of reference.model or, without that key, the one that the "
                "policy starts from",
            )

    def _with_other_adapters(self) -> int | None:
        """Return the checksum as versions up to 0.2.0 computed it: of a model under an adapter, it
        counts every adapter that is frozen. Every rank must call it."""
        if not isinstance(self.reference, AdapterView):
            return self.value
        frozen = [p for p in self.reference.model.parameters() if not p.requires_grad]
        return _checksum(frozen, self.process_group)


@torch.no_grad()
def parameter_checksum(model: Any, process_group: ProcessGroup = SINGLE_PROCESS) -> int:
    """Return the sum of the bit patterns of all parameters, read as integers.

    It is the same for sharded and for whole weights, and any change of one parameter changes it
    almost surely. Every rank must call it.
    """
    return _checksum(model.parameters(), process_group)


def _checksum(parameters: Iterable[Tensor], process_group: ProcessGroup) -> int:
    held = list(parameters)
    whole, parts = (
        _sum([_bits(p) for p in held if is_sharded(p) == kind]) for kind in (False, True)
    )
    process_group.all_reduce(parts)  # whole parameters are the same on every rank
    return int(whole) + int(parts)


def _sum(numbers: list[Tensor]) -> Int[Tensor, ""]:
    """Return the sum of some numbers, in main memory: one wait for the device for all of them."""
    return torch.stack(numbers).sum().cpu() if numbers else torch.zeros((), dtype=torch.int64)


def _bits(parameter: Tensor) -> Int[Tensor, ""]:
    """Return the sum over this rank's part, or 0 where another rank counts the same part. A sum of
    other integers in int64 copies what it sums on a CPU. There it is taken piece by piece, through
    one buffer: a new one for each piece would leave a hole in the heap before each sum that is
    kept, 1 GB in all for Gemma 3 270M."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    numbers = local_tensor(parameter.detach()).view(size).flatten()
    bits = torch.zeros((), dtype=torch.int64, device=numbers.device)
    if numbers.device.type == "cpu":
        buffer = torch.empty(min(PIECE, len(numbers)), dtype=torch.int64)
        for piece in numbers.split(PIECE):
            bits += buffer[: len(piece)].copy_(piece).sum()
    else:
        bits += numbers.sum(dtype=torch.int64)
    counts = not is_sharded(parameter) or is_first_replica(parameter)
    return bits if counts else torch.zeros_like(bits)
