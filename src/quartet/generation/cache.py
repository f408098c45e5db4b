"""How much a key-value cache may hold, and how prompts are spread over forward passes."""

from collections.abc import Sequence

from quartet.tensors import torch

MIN_ROWS = 64
"""Rows that are decoded together however large their keys and values are. With fewer rows, reading
the weights for each step would cost more than the memory is worth."""
PLAIN_ROWS = 512
"""Rows that are decoded together by the model's own forward, whatever their cache takes."""

WIDE_WEIGHT = 2**26
"""A matrix of so many numbers, the head of a large vocabulary, is not copied into another
layout."""
LOGITS_HELD = 3
"""How often the logits of a row are in memory while its token is drawn. They count with its keys
and values: of a vocabulary of 262,144 they are a megabyte each."""
LOGITS_HELD_ON_GPU = 9
"""The same on CUDA, which draws in more passes (`SAMPLING_COPIES` in `planning/gpu_memory.py`) and
whose recorded steps keep theirs."""

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass of the prefill; a longer prompt has a pass of its own."""


def cache_bytes(device: "torch.device | None" = None) -> int:
    """Return how many bytes keys, values and logits may take: half a GiB of main memory, or half of
    what is free on a GPU. What torch's allocator holds and has not given out is free too."""
    if device is None or device.type != "cuda":
        return 2**29
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + held) // 2


def spans_within(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Split a sequence into spans (start, stop) of neighbours whose sizes add up to at most
    `limit`; a larger one is alone in its span."""
    spans, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            spans.append((start, i))
            start, total = i, 0
        total += size
    return [*spans, (start, len(sizes))]
