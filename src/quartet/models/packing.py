"""Sequences end to end, real tokens only, behind a [B, T] face."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quartet.tensors import Bool, Int, Tensor

WORTH_PACKING = 0.1
"""The share of padding from which moving real tokens together costs less than computing with the
rest. Micro-batches hold rows of like length, so that most of them stay as they are."""


@dataclass(frozen=True)
class Packed:
    """The beginnings of some rows, as far as somebody wants to know what is said there.

    For rows of 4 and 2 tokens, `tokens` is [a0 a1 a2 a3 b0 b1], `positions` [0 1 2 3 0 1], and with
    nothing but the row's last token asked for, `output_index` is [3 5]. Where so little is padding that it
    may as well be computed, it stays: `places` is None, and `tokens` are the whole rectangle.
    """

    tokens: Int[Tensor, "N"]
    positions: Int[Tensor, "N"]
    lengths: tuple[int, ...]
    width: int
    """The longest of the lengths."""
    places: Int[Tensor, "N"] | None
    """Where each token is in the rectangle of rows × width."""
    output_index: Int[Tensor, "n"]
    """The tokens whose outputs are wanted, row by row."""
    rows: int = field(init=False)
    """How many lengths there are; a number of its own, for a compiled block to take any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.lengths))


def pack(tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]) -> Packed:
    """Each row up to the last position that is asked for: a causal model's output there depends on
    nothing later."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = torch.where(output_mask, positions + 1, 0).amax(dim=1)
    width = int(lengths.max())
    within = positions[:width] < lengths[:, None]
    output_places = output_mask[:, :width].flatten().nonzero()[:, 0]
    flat = tokens[:, :width].flatten()
    where = positions[:width].expand(len(tokens), width).flatten()
    sizes = tuple(lengths.tolist())
    if sum(sizes) >= (1 - WORTH_PACKING) * len(sizes) * width:
        return Packed(flat, where, (width,) * len(sizes), width, None, output_places)
    places = within.flatten().nonzero()[:, 0]
    index = torch.zeros(within.numel(), dtype=torch.long, device=tokens.device)
    index[places] = torch.arange(len(places), device=tokens.device)
    return Packed(flat[places], where[places], sizes, width, places, index[output_places])


def pack_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Whole rows, of which only the last token is asked for: what a prompt's answer begins from."""
    sizes = tuple(len(row) for row in rows)
    lengths = torch.tensor(sizes)
    width = max(sizes)
    positions = torch.cat([torch.arange(n) for n in sizes])
    starts = torch.repeat_interleave(torch.arange(len(rows)) * width, lengths)
    return Packed(
        tokens=torch.tensor([token for row in rows for token in row]).to(device),
        positions=positions.to(device),
        lengths=sizes,
        width=width,
        places=None if min(sizes) == width else (starts + positions).to(device),
        output_index=(lengths.cumsum(0) - 1).to(device),
    )


class _Take(torch.autograd.Function):
    """x[index] for an index without repetitions, so that its gradient is put back by a copy and not
    by an addition."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, index, grads[0]), None


def take(x: Tensor, index: Int[Tensor, "n"]) -> Tensor:
    """Some of the rows of x, each at most once."""
    taken: Tensor = _Take.apply(x, index)
    return taken


def unpacked(x: Tensor, packed: Packed) -> Tensor:
    """[N, …] as [rows, width, …], 0 where there was padding."""
    if packed.places is not None:
        x = x.new_zeros(packed.rows * packed.width, *x.shape[1:]).index_copy_(0, packed.places, x)
    return x.unflatten(0, (packed.rows, packed.width))


def repacked(x: Tensor, packed: Packed) -> Tensor:
    """[rows, width, …] as [N, …]."""
    flat = x.flatten(0, 1)
    return flat if packed.places is None else take(flat, packed.places)
