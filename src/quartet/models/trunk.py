"""What a trunk, a model without its head, has understood at the positions somebody asks about."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from quartet.models.adapters import checkpoint_contexts
from quartet.models.llama import (
    BLOCK_FORWARD,
    block_forward,
    has_fused_forward,
    packed_hidden_states,
)
from quartet.models.packing import pack
from quartet.tensors import Bool, Float, Int, Tensor


def hidden_states(
    trunk: Any, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "N H"]:
    """The last hidden states there, row by row, from right-padded rows. No real token can see
    padding, and its position is its index: transformers' own forward needs neither an attention
    mask nor position ids."""
    packed = pack(tokens, output_mask)
    if has_fused_forward(trunk, packed.width):
        return packed_hidden_states(trunk, packed)
    within = slice(None, packed.width)
    with checkpointing(trunk):
        return trunk(input_ids=tokens[:, within], use_cache=False).last_hidden_state[
            output_mask[:, within]
        ]


def checkpoint_blocks(model: Any) -> Any:
    """The model, which from now on keeps only what each block was given and computes the rest again
    for the gradient (Chen et al. 2016)."""
    for block in blocks_of(model):
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(_checkpoint, model)
    return model


def compile_blocks(model: Any) -> Any:
    """The model, whose written-out blocks run as torch.compile writes them when they are first
    used. Lengths stay variable."""
    # Reading and learning, one row and several, padded and packed, all tokens and some: each is a
    # program of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks_of(model):
        setattr(
            block,
            BLOCK_FORWARD,
            types.MethodType(torch.compile(block_forward, dynamic=True), block),
        )
    return model


def blocks_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpoint(model: Any, *args: Any) -> Any:
    return checkpoint(*args, use_reentrant=False, context_fn=checkpoint_contexts(model))


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """transformers makes its checkpoints in training mode only, and drops the cache then. So the
    blocks are in it while something is learnt; the modules inside them, and their dropout, never
    are."""
    blocks = [block for block in blocks_of(model) if block.gradient_checkpointing]
    for block in blocks:
        block.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
