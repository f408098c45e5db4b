"""Responses without padding, as libraries that pack sequences take them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def spans(mask: Tensor) -> list[slice]:
    """Return the place of each response in its row: from the first to the last token of a mask
    [B T]. What the mask leaves out in between belongs to it."""
    places = [row.nonzero().flatten().tolist() for row in mask]
    return [slice(own[0], own[-1] + 1) if own else slice(0, 0) for own in places]


def unpadded(table: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the responses of a table [B T] without their padding."""
    return [row[span] for row, span in zip(table, spans(mask), strict=True)]


def padded(responses: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return responses at their places in a table of the mask's shape, 0 elsewhere."""
    table = torch.zeros(mask.shape, dtype=responses[0].dtype)
    for row, span, own in zip(table, spans(mask), responses, strict=True):
        row[span] = own
    return table
