"""Ragged lists of token ids as rectangles."""

from collections.abc import Sequence

import torch

from quartet.tensors import Bool, Float, Int, Tensor

PAD = 0
"""What fills the rectangle. Any id does: what is real is known from lengths, and no real token
attends to padding."""


def right_pad(
    rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B"]]:
    """Tokens padded on the right, and the length of each row."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
    tokens = torch.full((len(rows), int(lengths.max())), PAD, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens.to(device), lengths


def left_pad(
    rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Tokens padded on the left, so that all rows end together, and the mask of real tokens."""
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
    """True from each row's first response token to its last."""
    positions = torch.arange(width, device=lengths.device)
    return (positions >= starts[:, None]) & (positions < lengths[:, None])


def spread(
    rows: Sequence[Sequence[float]], mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B T"]:
    """Ragged numbers, one per response token, at their places in the rectangle."""
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype, device=mask.device)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, flat)
