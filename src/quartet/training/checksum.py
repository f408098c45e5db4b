"""A number that shows whether the weights of a model have changed."""

from typing import Any

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import is_first_replica, is_sharded, local_tensor
from quartet.tensors import Int, Tensor

PIECE = 2**22
"""How many numbers are summed at once."""


@torch.no_grad()
def parameter_checksum(model: Any, process_group: ProcessGroup = SINGLE_PROCESS) -> int:
    """Return the sum of the bit patterns of all parameters, read as integers.

    It is the same for sharded and for whole weights, and any change of one parameter changes it
    almost surely. Every rank must call it.
    """
    whole, parts = (
        _sum([_bits(p) for p in model.parameters() if is_sharded(p) == kind])
        for kind in (False, True)
    )
    process_group.all_reduce(parts)  # whole parameters are the same on every rank
    return int(whole) + int(parts)


def _sum(numbers: list[Tensor]) -> Int[Tensor, ""]:
    """Return the sum of some numbers, in main memory: one wait for the device for all of them."""
    return torch.stack(numbers).sum().cpu() if numbers else torch.zeros((), dtype=torch.int64)


def _bits(parameter: Tensor) -> Int[Tensor, ""]:
    """Return the sum over this rank's part, or 0 where another rank counts the same part. It is
    taken piece by piece, because a sum in int64 copies what it sums on a CPU."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    pieces = local_tensor(parameter.detach()).view(size).flatten().split(PIECE)
    bits = torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()
    counts = not is_sharded(parameter) or is_first_replica(parameter)
    return bits if counts else torch.zeros_like(bits)
