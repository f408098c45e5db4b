"""Models and optimizer states that wait in main memory while others use the device, for a GPU that
cannot hold everything at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quartet.distributed.sharding import is_sharded
from quartet.tensors import Tensor

MAIN_MEMORY = torch.device("cpu")


class Placement:
    """Decides where models and optimizer states are. This one leaves everything on the device."""

    def register(self, module_or_optimizer: Any, shared_with: Iterable[Tensor] = ()) -> None:
        """Keep the weights of a model, or the moments of an optimizer, in main memory except inside
        `on_device`. Tensors in `shared_with` belong to another model and stay on the device."""

    @contextmanager
    def on_device(self, *modules_or_optimizers: Any) -> Iterator[None]:
        """Hold these on the device inside the `with` block. What was never registered is there
        anyway. Two threads must not do this for the same object at once."""
        yield


NO_OFFLOAD = Placement()


class Offloading(Placement):
    """Moves registered objects as a whole between main memory and the device.

    ZeRO-Offload (Ren et al. 2021) keeps moments in main memory too, and also steps the optimizer
    there; here the optimizer steps on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shared: dict[int, set[int]] = {}
        """For each registered object, by its id: the ids of the tensors that are not moved."""

    def register(self, module_or_optimizer: Any, shared_with: Iterable[Tensor] = ()) -> None:
        if isinstance(module_or_optimizer, nn.Module | torch.optim.Optimizer):
            self.shared[id(module_or_optimizer)] = {id(tensor) for tensor in shared_with}
            self._move(module_or_optimizer, MAIN_MEMORY)

    @contextmanager
    def on_device(self, *modules_or_optimizers: Any) -> Iterator[None]:
        registered = [each for each in modules_or_optimizers if id(each) in self.shared]
        try:
            for each in registered:
                self._move(each, self.device)
            yield
        finally:
            for each in registered:
                self._move(each, MAIN_MEMORY)

    def _move(
        self, module_or_optimizer: nn.Module | torch.optim.Optimizer, device: torch.device
    ) -> None:
        stay = self.shared[id(module_or_optimizer)]
        if isinstance(module_or_optimizer, torch.optim.Optimizer):
            # AdamW reads its step counter on the CPU: moving it would make every step wait.
            for moments in module_or_optimizer.state.values():
                moments |= {
                    name: moved(tensor, device)
                    for name, tensor in moments.items()
                    if name != "step"
                }
        elif any(map(is_sharded, module_or_optimizer.parameters())):
            # FSDP overrides `_apply` to keep its own references to the parts up to date.
            module_or_optimizer._apply(
                lambda tensor: tensor if id(tensor) in stay else moved(tensor, device)
            )
        else:
            # The parameter objects stay the same, since the optimizer and other models hold them.
            for tensor in (*module_or_optimizer.parameters(), *module_or_optimizer.buffers()):
                if id(tensor) not in stay:
                    tensor.data = moved(tensor.data, device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device."""
    return tensor.to(device)
