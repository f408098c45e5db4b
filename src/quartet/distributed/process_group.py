"""The ranks that train one model together, and the collective operations between them.

Every rank is given the same rows and computes the same division of them (`balance.py`), so only
results travel. Loops and formulas know `ProcessGroup` alone: in one process its operations do
nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from datetime import timedelta
from typing import Any

from quartet.distributed.balance import MicroBatch, Prefix, micro_batches, shares
from quartet.distributed.messages import pack, unpack
from quartet.distributed.sharding import is_sharded
from quartet.errors import QuartetError
from quartet.io.activity import counted
from quartet.io.threads import BackgroundThread, result_of
from quartet.tensors import Tensor, torch

log = logging.getLogger(__name__)
HERE = "here/{}"
"""The key that rank {} sets in the store when it has started."""
PATIENCE = 300.0
"""Seconds that ranks have to start: they import torch, perhaps from a slow disk."""
BUCKET = 25_000_000
"""The most gradient elements that one all-reduce sends."""
PULSE = 1.0
"""Seconds between two signals of rank 0 to ranks that wait for it; fewer where the deadline is less
than 4 seconds."""
BUSY, FAILED = -1, -2
"""Signals of rank 0: it is still at work; it has raised an error. Any other is the length of what
it sends next."""
PARTING = 2.0
"""Seconds that rank 0 gives the others to hear that it has failed."""


LEAVING = {True: 5.0, False: 1.0}
"""Seconds that the end of a rank's communicators may take: together with the others, and alone."""


class RankZeroFailed(QuartetError, RuntimeError):
    """Rank 0 has raised an error in what the other ranks waited for; the cause is there."""

    def __init__(self) -> None:
        super().__init__("rank 0 has failed in what this rank waited for.")


class ProcessGroup:
    """The interface of a process group, and its implementation for a single process."""

    rank = 0
    world_size = 1
    local_rank = 0
    """The rank among those on the same machine, which chooses the GPU."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank is the one that writes files and reports."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Return the rows of this rank, balanced by tokens."""
        return shares(lengths, self.world_size)[self.rank]

    def micro_batches(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        prefixes: Sequence[Prefix] | None = None,
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this rank, and report the progress through their tokens.
        Every rank gets the same number of them. Rows with equal `prefixes` are kept together where
        that saves work.

        Where weights are sharded, every forward pass needs all ranks. A rank with fewer
        micro-batches than another repeats the shortest row with `counts=False` meanwhile.
        """
        if not lengths:
            return
        by_rank = []
        for rows in shares(lengths, self.world_size, prefixes):
            beginnings = None if prefixes is None else [prefixes[i] for i in rows]
            groups = micro_batches([lengths[i] for i in rows], max_tokens, beginnings)
            by_rank.append([[rows[i] for i in group] for group in groups])
        most = max(map(len, by_rank))
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        own = [MicroBatch(rows) for rows in by_rank[self.rank]]
        own += [MicroBatch([shortest], counts=False)] * (most - len(own))
        tokens = lambda micro_batch: sum(lengths[i] for i in micro_batch.rows)  # noqa: E731
        yield from counted(own, tokens, sum(map(tokens, own)), "tokens")

    def all_reduce(self, *tensors: Tensor | None) -> None:
        """Replace each tensor, in place, by its sum over all ranks; `None` is skipped.

        Where each rank has filled in its own rows of a tensor of zeros, the sum holds all rows.
        """

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks."""
        return list(numbers)

    def all_reduce_max(self, number: float) -> float:
        """Return the largest of all ranks' numbers."""
        return number

    def all_gather(self, value: Any) -> list[Any]:
        """Return the JSON-ready value of every rank, by rank."""
        return [value]

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 alone, and return its JSON-ready result on every rank.

        It may take any time: the other ranks wait as long as rank 0 lives. Raises `RankZeroFailed`
        on them where the function raises an error.
        """
        return function()

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of the parameters that every rank holds whole. The gradients of sharded
        parameters have been summed by the backward pass."""

    def clone(self) -> "ProcessGroup":
        """Return a group of the same ranks for a second thread, whose messages cannot mix with
        those of this group. Every rank must call it."""
        return self


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """Several processes that communicate by torch.distributed: gloo between CPUs, NCCL between
    GPUs.

    Every rank must call the same operations in the same order. Where one rank does not call an
    operation within the group's deadline, it raises an error on all the others.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int | None = None) -> None:
        """`local_rank` is the rank among those on this machine; None: there is only one machine."""
        self.rank, self.world_size = rank, world_size
        self.local_rank = rank if local_rank is None else local_rank
        self.group: torch.distributed.ProcessGroup | None = None
        """The group in torch; None is torch's default group of all processes."""
        self.name = ""
        """Differs between the groups of the same ranks."""
        self.deadline = timedelta(seconds=PATIENCE)

    def join(
        self, store: "torch.distributed.Store", deadline: float, device: "torch.device"
    ) -> None:
        """Wait for all ranks to start, and connect to them.

        `deadline` is the number of seconds that a later operation waits for the other ranks.
        `device` is where this rank's models are: tensors on GPUs travel by NCCL, others by gloo.
        """
        self.deadline = timedelta(seconds=deadline)
        store.set(HERE.format(self.rank), "yes")
        store.wait(
            [HERE.format(other) for other in range(self.world_size)],
            timedelta(seconds=max(deadline, PATIENCE)),
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.deadline,
            device_id=device if device.type == "cuda" else None,
        )

    def leave(self, in_step: bool) -> None:
        """End what `join` began; without it, do nothing. The process may join again.

        `in_step` says that no operation is under way on any rank, and that all leave now: NCCL ends
        its communicators together. Otherwise they are aborted. Where either takes longer than
        `LEAVING` says, it is given up, and its thread is among `left_behind`.
        """
        if not torch.distributed.is_initialized():
            return
        ending = torch.distributed.distributed_c10d
        thread = BackgroundThread("leaving the ranks")
        end = ending.destroy_process_group if in_step else ending._abort_process_group
        leaving = thread.start(end)
        wait([leaving], LEAVING[in_step])
        if not leaving.done():
            log.warning("rank %d cannot end its communicators, and leaves them behind.", self.rank)
            thread.abandon(seconds=0.0)
            return
        thread.finish()
        if (error := leaving.exception()) is not None:
            log.warning("rank %d ends its communicators with an error: %s", self.rank, error)

    def clone(self) -> "TorchProcessGroup":
        clone = TorchProcessGroup(self.rank, self.world_size, self.local_rank)
        clone.deadline = self.deadline
        clone.group = torch.distributed.new_group(timeout=self.deadline)
        clone.name = f"{self.name}, clone"
        return clone

    def all_reduce(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.dtype == torch.bool:  # no sum of truth values: any rank's True counts
                numbers = tensor.to(torch.int32)
                torch.distributed.all_reduce(numbers, group=self.group)
                tensor.copy_(numbers > 0)
            else:
                torch.distributed.all_reduce(tensor, group=self.group)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=self.group)
        return list(map(float, sums.tolist()))

    def all_reduce_max(self, number: float) -> float:
        largest = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(largest)

    def all_gather(self, value: Any) -> list[Any]:
        # Byte tensors of one length: torch's own all_gather_object would unpickle what another
        # process sent.
        message = _byte_tensor(pack(value))
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(message)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = message
        messages = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        torch.distributed.all_gather(messages, padded, group=self.group)
        return [
            unpack(message[: int(size)].numpy().data)
            for message, size in zip(messages, sizes, strict=True)
        ]

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        if not self.is_rank_zero:
            message = torch.zeros(self._wait_for_rank_zero(), dtype=torch.uint8)
        else:
            signals = _Signals(self)
            try:
                message = _byte_tensor(pack(function()))
            except BaseException:
                signals.failed()
                raise
            signals.done(len(message))
        torch.distributed.broadcast(message, src=0, group=self.group)
        return unpack(message.numpy().data)

    def signal(self, number: int = 0) -> int:
        """Return a number that rank 0 sends to all ranks."""
        signal = torch.tensor([number])
        torch.distributed.broadcast(signal, src=0, group=self.group)
        return int(signal)

    def _wait_for_rank_zero(self) -> int:
        """Return the length of what rank 0 sends next, when it is ready."""
        began = noted = time.monotonic()
        while (signal := self.signal()) == BUSY:
            now = time.monotonic()
            if now - noted > self.deadline.total_seconds():
                noted = now
                log.warning(
                    "rank %d has waited %.0f s for rank 0, which is alive and at work alone: it "
                    "generates, or loads weights into servers.",
                    self.rank,
                    now - began,
                )
        if signal == FAILED:
            raise RankZeroFailed
        return signal

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        gradients = self._gradients_of_any([p for p in parameters if not is_sharded(p)])
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            for bucket in _buckets([g for g in gradients if g.dtype == dtype]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                torch.distributed.all_reduce(flat, group=self.group)
                sums = flat.split([gradient.numel() for gradient in bucket])
                for gradient, summed in zip(bucket, sums, strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def _gradients_of_any(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the parameters that have one on any rank. A rank that has none
        for such a parameter, because its rows did not use it, gets one of zeros: otherwise ranks
        would send tensors of other lengths, or of other parameters."""
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.bool)
        if parameters:
            self.all_reduce(used)
        gradients = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        return gradients


class _Signals:
    """What rank 0 tells the ranks that wait for it, in a thread of its own: every so often that it
    is busy, and at last the length of its message or that it has failed."""

    def __init__(self, process_group: TorchProcessGroup) -> None:
        self.process_group = process_group
        self.last = FAILED
        self.ended = threading.Event()
        self.thread = BackgroundThread("signals")
        self.sending = self.thread.start(self._send)

    def done(self, length: int) -> None:
        """Say how long the message is. Raises the error of a rank that could not be told."""
        self.last = length
        self.ended.set()
        try:
            result_of(self.sending)
        finally:
            self.thread.abandon(seconds=0.0)

    def failed(self) -> None:
        """Say that there will be no message, to the ranks that hear it in `PARTING` seconds."""
        self.ended.set()
        wait([self.sending], PARTING)
        self.thread.abandon(seconds=0.0)

    def _send(self) -> None:
        seconds = min(PULSE, self.process_group.deadline.total_seconds() / 4)
        while not self.ended.wait(seconds):
            self.process_group.signal(BUSY)
        self.process_group.signal(self.last)


def _byte_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the gradients in groups of at most `BUCKET` elements, or of one larger gradient."""
    buckets: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + gradient.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    return buckets
