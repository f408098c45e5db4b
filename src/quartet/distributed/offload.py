"""Models and optimizer states that wait in main memory while others use the device, for a GPU that
cannot hold everything at once."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quartet.distributed.sharding import has_even_parts, is_sharded, local_tensor, with_local
from quartet.tensors import Tensor

log = logging.getLogger(__name__)
MAIN_MEMORY = torch.device("cpu")
Registered = nn.Module | torch.optim.Optimizer


class Placement:
    """Decides where models and optimizer states are. This one leaves everything on the device."""

    def register(self, module_or_optimizer: Any, shared_with: Iterable[Tensor] = ()) -> None:
        """Keep the weights of a frozen model, or the moments of an optimizer, in main memory except
        inside `on_device`. Tensors in `shared_with` belong to another model and stay on the
        device."""

    @contextmanager
    def on_device(self, *modules_or_optimizers: Any, wait: bool = True) -> Iterator[None]:
        """Hold these on the device inside the `with` block. What was never registered is there
        anyway. Two threads must not do this for the same object at once.

        With `wait=False` they are on their way when the block begins, so that other work goes on
        meanwhile: call `ready` before they are read.
        """
        yield

    def ready(self, *modules_or_optimizers: Any) -> None:
        """Have what is asked of the device from now on wait until these have arrived. The host does
        not wait."""

    def settle(self) -> None:
        """Wait until everything that is to rest in main memory can be read there."""


NO_OFFLOAD = Placement()


class Transfer:
    """Copies tensors between a device and main memory.

    On CUDA, copies have a stream of their own and main memory is page-locked: only then does a GPU
    copy while it computes. Elsewhere, and for sharded tensors, each copy is awaited.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_cuda and torch.cuda.is_available() else None
        self.pins = on_cuda
        """Whether buffers are page-locked; False after the first one that could not be."""

    def store(self, tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Begin to copy a tensor to main memory, after the work on it that was asked for so far,
        and return the copy: `buffer`, where it has the same form."""
        if is_sharded(tensor):
            part = None if buffer is None else local_tensor(buffer)
            return with_local(tensor, self.store(local_tensor(tensor), part))
        if tensor.device.type == MAIN_MEMORY.type:
            return tensor
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffer(tensor)
        if self.stream is None:
            return buffer.copy_(tensor, non_blocking=self.pins)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is given to others after the copy only
        return buffer

    def load(self, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the device, after the copies that were begun before, and return
        the copy. It must not be read before `wait`."""
        if is_sharded(tensor):
            return with_local(tensor, self.load(local_tensor(tensor)))
        if self.stream is None:
            return tensor.to(self.device)
        # Memory of the stream that reads it: what the copying stream allocates stays in its pool.
        there = torch.empty_like(tensor, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            there.copy_(tensor, non_blocking=True)
        there.record_stream(self.stream)
        return there

    def mark(self) -> Any:
        """Return a mark behind the copies that were begun so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """Have later work of the device wait for the copies before a mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self) -> None:
        """Wait for all copies."""
        if self.stream is not None:
            self.stream.synchronize()

    def _buffer(self, tensor: Tensor) -> Tensor:
        """Return main memory for a tensor, page-locked where the system has any left."""
        if self.pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self.pins = False
                log.warning(
                    "run.offload: main memory cannot be page-locked (%s). Ordinary memory is used "
                    "from here on, and the GPU waits for each copy. A higher limit of locked "
                    "memory (ulimit -l) avoids that.",
                    str(error).partition("\n")[0].rstrip("."),
                )
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class Offloading(Placement):
    """Moves registered objects as a whole between main memory and the device.

    Each tensor has one buffer in main memory, which is allocated when the tensor first rests. The
    weights of a frozen model are never copied back: they are what they were. Moments are copied
    both ways.

    ZeRO-Offload (Ren et al. 2021) keeps moments in main memory too, and also steps the optimizer
    there; here the optimizer steps on the device.
    """

    def __init__(self, device: torch.device, transfer: Transfer | None = None) -> None:
        self.transfer = transfer or Transfer(device)
        self.shared: dict[int, set[int]] = {}
        """For each registered object, by its id: the ids of the tensors that are not moved."""
        self.buffers: dict[tuple[int, Any], Tensor] = {}
        """What rests or has rested, by its object's id and its place in the object."""
        self.arrivals: dict[int, Any] = {}
        """The marks behind the copies of objects that are on their way, by their ids."""

    def register(self, module_or_optimizer: Any, shared_with: Iterable[Tensor] = ()) -> None:
        if isinstance(module_or_optimizer, Registered):
            self.shared[id(module_or_optimizer)] = {id(tensor) for tensor in shared_with}
            self._forget(module_or_optimizer)
            self._replace(module_or_optimizer, self._stored(module_or_optimizer))
            if isinstance(module_or_optimizer, nn.Module):
                # The only copy of its weights to main memory, where they are read as they are
                # from now on (the reference's checksum).
                self.transfer.settle()

    @contextmanager
    def on_device(self, *modules_or_optimizers: Any, wait: bool = True) -> Iterator[None]:
        registered = [each for each in modules_or_optimizers if id(each) in self.shared]
        try:
            for each in registered:
                self._replace(each, self._loaded(each))
                self.arrivals[id(each)] = self.transfer.mark()
            if wait:
                self.ready(*registered)
            yield
        finally:
            for each in registered:
                self.arrivals.pop(id(each), None)
                self._replace(each, self._stored(each))

    def ready(self, *modules_or_optimizers: Any) -> None:
        for each in modules_or_optimizers:
            if id(each) in self.arrivals:
                self.transfer.wait(self.arrivals.pop(id(each)))

    def settle(self) -> None:
        self.transfer.settle()

    def _forget(self, registered: Registered) -> None:
        """Forget the weights of a model, which are another's or were loaded anew."""
        if isinstance(registered, nn.Module):
            self.buffers = {k: b for k, b in self.buffers.items() if k[0] != id(registered)}

    def _stored(self, registered: Registered) -> Callable[[Any, Tensor], Tensor]:
        """Return what gives a tensor's copy in main memory, by its place in an object."""
        is_frozen = isinstance(registered, nn.Module)

        def stored(place: Any, tensor: Tensor) -> Tensor:
            key = (id(registered), place)
            if not (is_frozen and key in self.buffers):
                self.buffers[key] = self.transfer.store(tensor, self.buffers.get(key))
                if is_frozen and is_sharded(tensor) and not has_even_parts(tensor):
                    self.transfer.settle()  # FSDP reads it now
            return self.buffers[key]

        return stored

    def _loaded(self, registered: Registered) -> Callable[[Any, Tensor], Tensor]:
        """Return what gives a tensor's copy on the device, by its place in an object."""
        is_frozen = isinstance(registered, nn.Module)

        def loaded(place: Any, tensor: Tensor) -> Tensor:
            if not is_frozen:
                return self.transfer.load(tensor)
            # FSDP may have put a padded copy of the buffer in the tensor's place.
            copied = self.transfer.load(self.buffers[id(registered), place])
            if is_sharded(tensor) and not has_even_parts(tensor):
                self.transfer.wait(self.transfer.mark())  # FSDP reads it now
            return copied

        return loaded

    def _replace(
        self, registered: Registered, replacement: Callable[[Any, Tensor], Tensor]
    ) -> None:
        """Put `replacement(place, tensor)` in the place of each tensor of an object."""
        stay = self.shared[id(registered)]
        if isinstance(registered, torch.optim.Optimizer):
            # AdamW reads its step counter on the CPU: moving it would make every step wait.
            for number, moments in enumerate(registered.state.values()):
                moments |= {
                    name: replacement((number, name), tensor)
                    for name, tensor in moments.items()
                    if name != "step" and isinstance(tensor, torch.Tensor)
                }
        elif any(map(is_sharded, registered.parameters())):
            # FSDP overrides `_apply` to keep its own references to the parts up to date.
            replaced = set(stay)

            def replace_once(tensor: Tensor) -> Tensor:
                if id(tensor) in replaced:  # or another module's too: the object stays the same
                    return tensor
                replaced.add(id(tensor))
                return replacement(len(replaced), tensor)

            registered._apply(replace_once)
        else:
            # The parameter objects stay the same, since the optimizer and other models hold them.
            tensors = (*registered.parameters(), *registered.buffers())
            for number, tensor in enumerate(tensors):
                if id(tensor) not in stay:
                    tensor.data = replacement(number, tensor.data)
