"""Padding: ragged lists of token ids and numbers as rectangular tensors."""

from collections.abc import Sequence

import torch

from quartet.tensors import Bool, Float, Int, Tensor

PAD = 0
"""The id that fills a rectangle. Any id would do: real tokens are known by lengths and masks, and
no real token attends to padding."""


def right_pad(
    rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B"]]:
    """Return the rows padded on the right, and the length of each."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
    tokens = torch.full((len(rows), int(lengths.max())), PAD, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens.to(device), lengths


def left_pad(
    rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Return the rows padded on the left, so that all end in the last column, and the mask of real
    tokens."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), PAD, dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    return tokens.to(device), mask.to(device)


def response_mask(
    starts: Int[Tensor, "B"], lengths: Int[Tensor, "B"], width: int
) -> Bool[Tensor, "B {width}"]:
    """Return a mask that is True from each row's first response token (`starts`) to its last."""
    positions = torch.arange(width, device=lengths.device)
    return (positions >= starts[:, None]) & (positions < lengths[:, None])


def spread(
    rows: Sequence[Sequence[float]], mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B T"]:
    """Return numbers, one per response token of each row, at the True places of the mask; 0
    elsewhere."""
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype, device=mask.device)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, flat)
