"""Weights from the trainer's GPU to the GPUs of vLLM servers over NCCL, without a folder.

This is vLLM's weight transfer (docs.vllm.ai, "Weight Transfer", and its endpoints; read in November
2026). Each server's workers form a group with this process, which is rank 0. Its NCCL id travels
over HTTP, as base64; nothing is pickled. For new weights, the server is told the names, dtypes and
shapes, and receives the bytes by broadcast while that request is under way.

A group belongs to one server, so that one which dies takes nothing else with it: its group is
aborted, and a new one is made when the server is back.
"""

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch

from quartet.errors import QuartetError
from quartet.io.threads import BackgroundThread, result_of
from quartet.tensors import Tensor

CHUNK_BYTES = 2**28
"""Tensors travel together until they are more bytes than this, so that small ones cost no broadcast
each. Rank 0 and each worker hold two such buffers."""
BUFFERS = 2
GIVE_UP_SECONDS = 1.0
"""How long the end of an aborted broadcast is waited for."""

Ask = Callable[[str, str, Any], Mapping[str, Any]]
"""Send a request (method, path, JSON body) to a server and return the object that it answers.
Raises where it refuses."""


class TransferFailed(QuartetError, RuntimeError):
    """The bytes did not arrive. The message is a phrase that follows the server's name."""


@runtime_checkable
class Group(Protocol):
    """What is used of a process group of torch."""

    def allreduce(self, tensors: list[Tensor]) -> Any: ...

    def broadcast(self, tensor: Tensor, root: int) -> Any: ...

    def abort(self) -> None: ...


OpenGroup = Callable[[int], tuple[Group, Callable[[], bytes]]]
"""Make a group of so many ranks, as rank 0. Return it, and what waits for its id, which
exists once the first collective has begun."""


def open_nccl(size: int) -> tuple[Group, Callable[[], bytes]]:
    """Return an NCCL group of torch outside of the run's own, and what waits for its id.

    torch puts the id of a group's first communicator into the group's store, under "0".
    """
    from torch.distributed import HashStore, ProcessGroupNCCL

    store, options = HashStore(), ProcessGroupNCCL.Options()
    # A request has ended long before: after this time torch would end the process.
    options._timeout = timedelta(days=1)
    group: Any = ProcessGroupNCCL(store, 0, size, options)
    return group, lambda: bytes(store.get("0"))


class WeightTransfer:
    """Sends weights to servers. `push` may be called from several threads, for a server each."""

    def __init__(
        self,
        named: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        open_group: OpenGroup = open_nccl,
    ) -> None:
        """`named` returns what is sent, by the names of a model folder, for the weights of
        `hold`. They travel in `dtype` through `device`."""
        self.named, self.dtype, self.device, self.open_group = named, dtype, device, open_group
        self.held: Mapping[str, Tensor] | None = None
        self._groups: dict[str, Group] = {}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights, which `push` sends until `release`."""
        self.held = self.named(tensors)

    def release(self) -> None:
        """Forget the weights. They may be those that are being trained, and change from here on."""
        self.held = None

    def push(self, server: str, version: int, ask: Ask) -> None:
        """Send the weights to a server that is paused, and their version. Raises TransferFailed,
        and what `ask` raises; then the server may have parts of them."""
        assert self.held is not None
        try:
            if server not in self._groups:
                self._groups[server] = self._opened(ask)
            self._start(ask)
            update = {
                "names": list(self.held),
                "dtype_names": [str(self._dtype(x)).removeprefix("torch.") for x in self._tensors],
                "shapes": [list(x.shape) for x in self._tensors],
            }
            _together(
                lambda: self._broadcast(self._groups[server]),
                lambda: ask("POST", "/update_weights", {"update_info": update}),
                self._groups[server].abort,
            )
            ask("POST", "/finish_weight_update", None)
            ask("POST", "/update_weight_version", {"new_version": str(version)})
        except BaseException:
            self._drop(server)
            raise

    def close(self) -> None:
        """Leave all groups."""
        for server in list(self._groups):
            self._drop(server)

    @property
    def _tensors(self) -> list[Tensor]:
        assert self.held is not None
        return list(self.held.values())

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _opened(self, ask: Ask) -> Group:
        """Return a group with all workers of a server. NCCL waits for everyone in the first
        collective; vLLM's is a sum of one number."""
        workers = ask("GET", "/get_world_size", None).get("world_size")
        if type(workers) is not int or workers < 1:
            raise TransferFailed(f"does not say how many workers it has ({workers!r})")
        group, wait_for_id = self.open_group(1 + workers)

        def request() -> Any:
            init = {
                "rank_offset": 1,
                "world_size": 1 + workers,
                "nccl_unique_id_b64": base64.b64encode(wait_for_id()).decode(),
                "packed": True,
                "packed_buffer_size_bytes": CHUNK_BYTES,
                "packed_num_buffers": BUFFERS,
            }
            return ask("POST", "/init_weight_transfer_engine", {"init_info": init})

        one = torch.zeros(1, device=self.device)
        _together(lambda: _done(group.allreduce([one]), self.device), request, group.abort)
        return group

    @staticmethod
    def _start(ask: Ask) -> None:
        """Begin an update. A server in which an earlier one was not finished, because it failed or
        this process was killed, refuses to begin another: that one is finished first."""
        try:
            ask("POST", "/start_weight_update", None)
        except QuartetError:
            with contextlib.suppress(QuartetError):
                ask("POST", "/finish_weight_update", None)
            ask("POST", "/start_weight_update", None)

    def _broadcast(self, group: Group) -> None:
        for chunk in self._chunks():
            _done(group.broadcast(chunk, 0), self.device)

    @torch.no_grad()
    def _chunks(self) -> Iterator[Tensor]:
        """Yield the bytes of all weights in order. A chunk ends with the tensor that makes it
        larger than CHUNK_BYTES, which is where vLLM's workers end it."""
        chunk: list[Tensor] = []
        size = 0
        for tensor in self._tensors:
            moved = tensor.detach().to(self.device, self._dtype(tensor)).contiguous()
            chunk.append(moved.flatten().view(torch.uint8))
            size += chunk[-1].numel()
            if size > CHUNK_BYTES:
                yield torch.cat(chunk)
                chunk, size = [], 0
        if chunk:
            yield torch.cat(chunk)

    def _drop(self, server: str) -> None:
        if (group := self._groups.pop(server, None)) is not None:
            group.abort()


def _done(work: Any, device: torch.device) -> None:
    """Wait until a collective has ended on its device."""
    work.wait()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _together(
    collective: Callable[[], None], request: Callable[[], Any], abort: Callable[[], None]
) -> None:
    """Make both calls at the same time; each ends only with the other. Where the request fails,
    the collective is aborted. Raises what the request raises, and TransferFailed."""
    thread = BackgroundThread("transfer")
    moved = thread.start(collective)
    try:
        request()
        result_of(moved)
    except RuntimeError as error:
        if moved.done() and moved.exception() is error:
            raise TransferFailed(f"lost its connection for weights ({error})") from error
        raise
    finally:
        if not moved.done():
            abort()
            thread.abandon(GIVE_UP_SECONDS)
        else:
            thread.finish()
