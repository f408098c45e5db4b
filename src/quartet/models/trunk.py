"""What a trunk, a model without its head, has understood at the positions somebody asks about."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from quartet.models.adapters import as_now
from quartet.models.llama import hidden_states, written_out
from quartet.models.packing import pack
from quartet.tensors import Bool, Float, Int, Tensor


def read(trunk: Any, tokens: Int[Tensor, "B T"], asked: Bool[Tensor, "B T"]) -> Float[Tensor, "N H"]:
    """The last hidden states there, row by row, from right-padded rows. No real token can see padding, and its position is its
    index: transformers' own forward needs neither an attention mask nor position ids."""
    packed = pack(tokens, asked)
    if written_out(trunk, packed.width):
        return hidden_states(trunk, packed)
    within = slice(None, packed.width)
    with checkpointing(trunk):
        return trunk(input_ids=tokens[:, within], use_cache=False).last_hidden_state[asked[:, within]]


def checkpoint_blocks(model: Any) -> Any:
    """The model, which from now on keeps only what each block was given and computes the rest again for the gradient (Chen
    et al. 2016)."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(_checkpoint, model)
    return model


def _checkpoint(model: Any, *args: Any) -> Any:
    return checkpoint(*args, use_reentrant=False, context_fn=as_now(model))


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """transformers makes its checkpoints in training mode only, and drops the cache then. So the blocks are in it while
    something is learnt; the modules inside them, and their dropout, never are."""
    blocks = [b for b in model.modules() if isinstance(b, GradientCheckpointingLayer) and b.gradient_checkpointing]
    for block in blocks:
        block.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
