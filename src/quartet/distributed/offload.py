"""What waits in main memory while others work: for a GPU that cannot hold everything at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quartet.distributed.team import is_sharded
from quartet.tensors import Tensor

MAIN_MEMORY = torch.device("cpu")


class Placement:
    """Who is where: here, everything stays on the device."""

    def rests(self, thing: Any, shared_with: Iterable[Tensor] = ()) -> None:
        """From now on a model's weights, or an optimizer's moments, are on the device only
        `at_work`. Tensors that it shares with another stay."""

    @contextmanager
    def at_work(self, *things: Any) -> Iterator[None]:
        """With these on the device; whoever never rests is there anyway. For the same thing not
        from two threads at once."""
        yield


STAYS = Placement()


class Offloading(Placement):
    """What rests is moved to main memory and back, whole. (ZeRO-Offload, Ren et al. 2021, moves
    moments too; what it also does, stepping on the CPU, this does not.)"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shared: dict[int, set[int]] = {}
        """Of each that rests, by id: tensors that stay."""

    def rests(self, thing: Any, shared_with: Iterable[Tensor] = ()) -> None:
        if isinstance(thing, nn.Module | torch.optim.Optimizer):
            self.shared[id(thing)] = {id(tensor) for tensor in shared_with}
            self._move(thing, MAIN_MEMORY)

    @contextmanager
    def at_work(self, *things: Any) -> Iterator[None]:
        resting = [thing for thing in things if id(thing) in self.shared]
        try:
            for thing in resting:
                self._move(thing, self.device)
            yield
        finally:
            for thing in resting:
                self._move(thing, MAIN_MEMORY)

    def _move(self, thing: nn.Module | torch.optim.Optimizer, device: torch.device) -> None:
        stay = self.shared[id(thing)]
        if isinstance(thing, torch.optim.Optimizer):
            for moments in thing.state.values():
                moments |= {
                    name: moved(tensor, device)
                    for name, tensor in moments.items()
                    if name != "step"
                }
        elif any(map(is_sharded, thing.parameters())):
            thing._apply(
                lambda tensor: tensor if id(tensor) in stay else moved(tensor, device)
            )  # FSDP does more than that
        else:
            for tensor in (*thing.parameters(), *thing.buffers()):
                if id(tensor) not in stay:
                    tensor.data = moved(tensor.data, device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)
