"""Who does which rows: the micro-batches of one process, and the shares of several that train one
model together.

Every rank holds the same rows and knows the length of each, so who takes which needs no message:
all of them reckon it alike. Only what was found travels. A rank that has less to do than another
goes through a piece that counts for nothing meanwhile: where weights are sharded, every pass takes
all ranks.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from quartet.tensors import Tensor, torch

HERE = "here/{}"
"""What a rank writes into the store when it has begun."""
PATIENCE = 300.0
"""Seconds in which all ranks have begun: they import torch, and may be on slow disks."""
BUCKET = 25_000_000
"""Numbers of a gradient that travel at once."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices cut into groups whose rectangles hold at most `max_tokens` tokens each (or a
    single row), rows of like length together, so that little of a rectangle is padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def shares(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Row indices for each rank, in order: the longest first to whoever has the fewest tokens yet
    (Graham 1969), which is never more than 4/3 of the best there is.

    >>> shares([5, 3, 3, 1], 2)
    [[0, 3], [1, 2]]
    """
    made: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(world), key=lambda r: (tokens[r], len(made[r]), r))
        made[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(rows) for rows in made]


@dataclass(frozen=True)
class Piece:
    """Rows that go through the models at once."""

    rows: list[int]
    counts: bool = True
    """False: somebody else's rows, gone through only to keep pace. Nothing of it may count."""


class Team:
    """The ranks that train one model together: here, one that is alone. Each verb is then nothing,
    and costs nothing."""

    rank = 0
    world = 1

    @property
    def lead(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """The rows of this rank, balanced by tokens."""
        return shares(lengths, self.world)[self.rank]

    def pieces(self, lengths: Sequence[int], max_tokens: int) -> list[Piece]:
        """The micro-batches of this rank: as many on each."""
        if not lengths:
            return []
        by_rank = []
        for rows in shares(lengths, self.world):
            by_rank.append(
                [
                    [rows[i] for i in piece]
                    for piece in micro_batches([lengths[i] for i in rows], max_tokens)
                ]
            )
        count = max(map(len, by_rank))
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        mine = [Piece(rows) for rows in by_rank[self.rank]]
        return mine + [Piece([shortest], counts=False)] * (count - len(mine))

    def add_up(self, *tensors: Tensor | None) -> None:
        """Each tensor becomes the sum of all ranks' in place; of what stands at zero elsewhere,
        that is its collection."""

    def total(self, *numbers: float) -> list[float]:
        return list(numbers)

    def highest(self, number: float) -> float:
        return number

    def exchange(self, mine: Any) -> list[Any]:
        """What each rank has to say, by rank; JSON-ready."""
        return [mine]

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Of parameters that every rank holds whole. Where parameters are sharded, the backward
        pass has done it."""

    def apart(self) -> "Team":
        """The same ranks for a second thread of each: what they say does not mix with this team's.
        All must ask."""
        return self


ALONE = Team()


class Together(Team):
    """Several processes, by torch.distributed: gloo between CPUs, NCCL between GPUs. Every rank
    calls the same verbs in the same order; a rank that does not come within the group's deadline
    ends the wait of all others with an error."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.group: torch.distributed.ProcessGroup | None = None
        """None: torch's own, of all processes."""
        self.name = ""
        """No two teams of the same ranks have the same."""
        self.deadline = timedelta(seconds=PATIENCE)

    def join(
        self, store: "torch.distributed.Store", deadline: float, device: "torch.device"
    ) -> None:
        """Until the others are there. `deadline`: seconds after which nobody waits any longer for
        what comes then. `device`: where this rank's models are; what travels between GPUs goes by
        NCCL, all else by gloo."""
        self.deadline = timedelta(seconds=deadline)
        store.set(HERE.format(self.rank), "yes")
        store.wait(
            [HERE.format(other) for other in range(self.world)],
            timedelta(seconds=max(deadline, PATIENCE)),
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world,
            timeout=self.deadline,
        )

    def apart(self) -> "Together":
        made = Together(self.rank, self.world)
        made.deadline, made.group = (
            self.deadline,
            torch.distributed.new_group(timeout=self.deadline),
        )
        made.name = f"{self.name}, apart"
        return made

    def add_up(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.dtype == torch.bool:
                numbers = tensor.to(torch.int32)
                torch.distributed.all_reduce(numbers, group=self.group)
                tensor.copy_(numbers > 0)
            else:
                torch.distributed.all_reduce(tensor, group=self.group)

    def total(self, *numbers: float) -> list[float]:
        made = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(made, group=self.group)
        return list(map(float, made.tolist()))

    def highest(self, number: float) -> float:
        made = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(made, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(made)

    def exchange(self, mine: Any) -> list[Any]:
        said = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        torch.distributed.all_gather(sizes, torch.tensor([len(said)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(said)] = said
        heard = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        torch.distributed.all_gather(heard, padded, group=self.group)
        return [
            json.loads(bytes(text[: int(size)].tolist()))
            for text, size in zip(heard, sizes, strict=True)
        ]

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        held = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
        for dtype in sorted({gradient.dtype for gradient in held}, key=str):
            for bucket in _buckets([gradient for gradient in held if gradient.dtype == dtype]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                torch.distributed.all_reduce(flat, group=self.group)
                for gradient, summed in zip(
                    bucket, flat.split([g.numel() for g in bucket]), strict=True
                ):
                    gradient.copy_(summed.view_as(gradient))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds a part. (Importing the class takes a
    second.)"""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of it, or all of it."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every rank must ask."""
    everything: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return everything


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank's part of it is the one to write and count: where several rows of ranks
    hold the same, the first's."""
    return not any(tensor.device_mesh.get_coordinate()[:-1])  # type: ignore[attr-defined]


class Gathered(Mapping[str, Tensor]):
    """The weights of a model by their names, each put together when it is asked for, so that there
    need not be room for all. Every rank must ask for the same ones in the same order."""

    def __init__(self, model: Any, others: Mapping[str, Tensor] | None = None) -> None:
        """`others`: what stands in for parameters, by their names."""
        instead = (
            {id(p): others[name] for name, p in model.named_parameters() if name in others}
            if others
            else {}
        )
        self.held = {
            name: instead.get(id(t), t) for name, t in model.state_dict(keep_vars=True).items()
        }

    def only(self, wanted: Callable[[str], bool]) -> "Gathered":
        """Some of them."""
        made = copy.copy(self)
        made.held = {name: tensor for name, tensor in self.held.items() if wanted(name)}
        return made

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return whole(self.held[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def whole_state(
    model: Any, others: Mapping[str, Tensor] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """All of them, `collected`. Every rank must ask."""
    return collected(Gathered(model, others), keep)


def collected(gathered: Gathered, keep: bool = True) -> dict[str, Tensor]:
    """All of them; one that has two names is one tensor. Those that were in parts are on the CPU.
    `keep`: whether this rank wants them, or only helps others to have them. Every rank must ask."""
    state, first = dict[str, Tensor](), dict[int, str]()
    for name, held in gathered.held.items():
        if (known := first.setdefault(id(held), name)) != name:
            state[name] = state[known]
            continue
        tensor = gathered[name].cpu() if is_sharded(held) else gathered[name]
        state[name] = tensor if keep else torch.empty(0)
    return state if keep else {}


def restore(target: Tensor, saved: Any) -> Tensor:
    """The target with what was saved of it: a tensor, or something to be cut along its first
    dimension as one. A sharded target takes its own part."""
    mine = local(target)
    if not is_sharded(target):
        return mine.copy_(saved[:] if not isinstance(saved, torch.Tensor) else saved)
    mesh = target.device_mesh  # type: ignore[attr-defined]
    each = -(-target.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(each * mesh.get_coordinate()[-1], target.shape[0])
    mine.copy_(saved[start : start + mine.shape[0]])
    return target


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    made: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if made[-1] and sum(g.numel() for g in made[-1]) + gradient.numel() > BUCKET:
            made.append([])
        made[-1].append(gradient)
    return made
