"""Packing: the real tokens of right-padded rows [B, T] end to end as one sequence [N].

Products of weights and hidden states then compute no padding; attention unpacks for a moment.

Rows with the same prompt (the answers of a group, the two sides of a comparison) compute it once:
a causal model's states of the prompt depend on nothing behind it. The first of these rows is packed
whole, the others without the prompt, whose keys and values attention reads from the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from quartet.distributed.balance import Prefix
from quartet.tensors import Bool, Float, Int, Tensor

WORTH_PACKING = 0.1
"""The share of padding and of repeated prompts from which packing costs less time than computing
them."""


@dataclass(frozen=True)
class Repeats:
    """Tokens that rows have in common with an earlier row, which computes them."""

    places: Int[Tensor, "M"]
    """The index of each in the flattened rectangle of rows × width."""
    sources: Int[Tensor, "M"]
    """The index of the packed token that it repeats."""
    keys: Int[Tensor, "K"]
    """The packed token at each place of the whole rows, end to end."""
    key_starts: Int[Tensor, "R"]
    """Where each whole row begins in `keys`, and where the last one ends; int32."""


@dataclass(frozen=True)
class Packed:
    """The tokens of some rows, each row up to the last position whose output is needed.

    For rows of 4 and 2 tokens, `tokens` is [a0 a1 a2 a3 b0 b1], `positions` [0 1 2 3 0 1], and with
    only the outputs of each row's last token needed, `output_index` is [3 5]. Where less than
    `WORTH_PACKING` of the rectangle is padding, nothing is packed: `places` is None, and `tokens`
    is the whole rectangle, row by row.
    """

    tokens: Int[Tensor, "N"]
    positions: Int[Tensor, "N"]
    lengths: tuple[int, ...]
    width: int
    """The longest of the lengths."""
    places: Int[Tensor, "N"] | None
    """The index of each token in the flattened rectangle of rows × width; None: not packed."""
    output_index: Int[Tensor, "n"]
    """The indices of the tokens whose outputs are needed, row by row."""
    repeats: Repeats | None = None
    """What rows leave out because an earlier row has it, too. `lengths`, `starts` and `places` are
    without it."""
    starts: Int[Tensor, "R"] = field(init=False)
    """Where each row begins in `tokens`, and where the last one ends; int32, as kernels want it."""
    rows: int = field(init=False)
    """The number of rows. It is a field, not `len(lengths)`, because torch.compile would make a
    program for each length of the tuple."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.lengths))
        starts = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        object.__setattr__(self, "starts", starts.to(self.tokens.device, non_blocking=True))


def pack(
    tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"], device: torch.device | None = None
) -> Packed:
    """Return each row up to the last position of the mask, packed. Later tokens are left out: a
    causal model's output depends on nothing after it.

    `device` is where the model is, by default where the tokens are. What decides shapes is computed
    on the CPU: tokens and mask that are there cost no wait for the device. On other devices than a
    CPU rows are always packed.
    """
    device = tokens.device if device is None else device
    tokens, mask = tokens.cpu(), output_mask.cpu()
    positions = torch.arange(mask.shape[1])
    lengths = torch.where(mask, positions + 1, 0).amax(dim=1)
    width = int(lengths.max())
    within = positions[:width] < lengths[:, None]
    output_places = mask[:, :width].flatten().nonzero()[:, 0]
    where = positions[:width].expand(len(mask), width).flatten()
    flat = tokens[:, :width].flatten()
    worth = WORTH_PACKING if device.type == "cpu" else 0.0
    first_rows, shared = _shared_prefixes(tokens, mask)
    repeated = positions[:width] < shared[:, None]
    if repeated.sum() <= worth * lengths.sum():
        repeated = torch.zeros_like(repeated)
    own = within & ~repeated

    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    if own.sum() >= (1 - worth) * own.numel():
        full = (width,) * len(mask)
        return Packed(moved(flat), moved(where), full, width, None, moved(output_places))
    places = own.flatten().nonzero()[:, 0]
    index = torch.zeros(own.numel(), dtype=torch.long)
    index[places] = torch.arange(len(places))
    repeats = None
    if repeated.any():
        sources = first_rows[:, None] * width + positions[:width]
        index = torch.where(repeated.flatten(), index[sources.flatten()], index)
        repeated_places = repeated.flatten().nonzero()[:, 0]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        repeats = Repeats(
            moved(repeated_places),
            moved(index[repeated_places]),
            moved(index[within.flatten()]),
            moved(starts.to(torch.int32)),
        )
    return Packed(
        moved(flat[places]),
        moved(where[places]),
        tuple(own.sum(1).tolist()),
        width,
        moved(places),
        moved(index[output_places]),
        repeats,
    )


def prefixes(tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]) -> list[Prefix]:
    """Return what is before the first output of each row that is needed: what rows can share.

    Where the outputs predict a response, it is the prompt without its last token, whose output
    predicts the response's first token.
    """
    mask = output_mask.cpu()
    firsts = torch.where(mask.any(1), mask.to(torch.int8).argmax(1), 0).tolist()
    rows = tokens.cpu().numpy()
    return [Prefix(row[:n].tobytes(), n) for row, n in zip(rows, firsts, strict=True)]


def _shared_prefixes(
    tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """Return the first row with the prefix of each row, and how many tokens the row has in common
    with it: 0 for that row itself."""
    first_rows: dict[Prefix, int] = {}
    rows = prefixes(tokens, output_mask)
    firsts = [first_rows.setdefault(prefix, row) for row, prefix in enumerate(rows)]
    shared = [0 if row == first else rows[row].length for row, first in enumerate(firsts)]
    return torch.tensor(firsts), torch.tensor(shared)


def pack_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Return whole rows, packed, with the output of the last token of each: the position that
    predicts the first token of a response."""
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
    """x[index] for an index without repetitions. Its gradient is then a copy, where that of torch's
    own indexing is an addition, which is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, index, grads[0]), None


def take(x: Tensor, index: Int[Tensor, "n"]) -> Tensor:
    """Return x[index] for an index without repetitions."""
    rows: Tensor = _Take.apply(x, index)  # type: ignore[no-untyped-call]
    return rows


def real_tokens(packed: Packed, output_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "N"]:
    """Return 1 for each token of the rectangle of rows × width that is in its row, and 0 for
    padding. `output_mask` is the one that was packed."""
    positions = torch.arange(output_mask.shape[1])
    lengths = torch.where(output_mask.cpu(), positions + 1, 0).amax(dim=1)
    within = positions[: packed.width] < lengths[:, None]
    return within.flatten().float().to(packed.tokens.device, non_blocking=True)


def tokens_stood_for(packed: Packed, output_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "N"]:
    """Return how many tokens of the rows each packed token stands for: 0 for padding, and more than
    1 for a prompt that rows share. `output_mask` is the one that was packed."""
    if packed.places is None:
        return real_tokens(packed, output_mask)
    ones = torch.ones(len(packed.tokens), device=packed.tokens.device)
    if packed.repeats is None:
        return ones
    keys = packed.repeats.keys
    return torch.zeros_like(ones).index_add_(0, keys, torch.ones_like(keys, dtype=ones.dtype))


def unpacked(x: Tensor, packed: Packed, repeats: Repeats | None = None) -> Tensor:
    """Return packed values [N, …] as a rectangle [rows, width, …] with 0 for padding, and for what
    rows have in common with earlier rows unless `repeats` says what it is."""
    if packed.places is not None:
        flat = x.new_zeros(packed.rows * packed.width, *x.shape[1:])
        flat = flat.index_copy_(0, packed.places, x)
        if repeats is not None:
            flat = flat.index_copy(0, repeats.places, repeated(x, repeats.sources))
        x = flat
    rectangle: Tensor = x.unflatten(0, (packed.rows, packed.width))
    return rectangle


def repeated(x: Tensor, index: Int[Tensor, "M"]) -> Tensor:
    """Return x[index] for an index with repetitions, whose gradients are added in a fixed order on
    each device."""
    # The gradient of `index_select` is one atomic addition each on a GPU, in any order. That of
    # indexing is sorted there, and slower on a CPU.
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


def repacked(x: Tensor, packed: Packed) -> Tensor:
    """Return a rectangle [rows, width, …] as packed values [N, …]."""
    flat = x.flatten(0, 1)
    return flat if packed.places is None else take(flat, packed.places)
