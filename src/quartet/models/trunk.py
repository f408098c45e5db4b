"""The trunk of a model (all but its head): its last hidden states, activation checkpoints, and
compiled blocks."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from quartet.models.adapters import checkpoint_contexts
from quartet.models.fused import (
    BLOCK_FORWARD,
    blocks_in,
    has_fused_forward,
    held_block_forward,
    layers_of,
    packed_hidden_states,
)
from quartet.models.packing import pack, real_tokens, take, tokens_stood_for
from quartet.models.protocols import CausalModel, Trunk
from quartet.models.routing import recorder_of
from quartet.tensors import Bool, Float, Int, Tensor


def hidden_states(
    trunk: Trunk, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "N H"]:
    """Return the last hidden states at the positions of the mask, row by row, of right-padded rows.

    Causal attention keeps real tokens from seeing the padding on their right, and the position of a
    token is its index. transformers' own forward therefore needs neither an attention mask nor
    position ids.
    """
    device = next(trunk.parameters()).device
    packed = pack(tokens, output_mask, device)
    recorder = recorder_of(trunk)
    if has_fused_forward(trunk, packed.width):
        if recorder is None:
            return packed_hidden_states(trunk, packed)
        # All blocks compute all tokens, so that the last block's router is given them, too.
        recorder.begin(tokens_stood_for(packed, output_mask))
        every = torch.arange(len(packed.tokens), device=device)
        states = packed_hidden_states(trunk, replace(packed, output_index=every))
        return take(states, packed.output_index)
    if recorder is not None:
        recorder.begin(real_tokens(packed, output_mask))
    with checkpointing(trunk):
        hidden: Tensor = trunk(
            input_ids=tokens[:, : packed.width].to(device), use_cache=False
        ).last_hidden_state
    return rows_at(hidden, output_mask[:, : packed.width])


def rows_at(values: Float[Tensor, "B T *rest"], mask: Bool[Tensor, "B T"]) -> Tensor:
    """Return values[mask]. A mask in main memory costs no wait for the device of the values."""
    if values.device == mask.device:
        return values[mask]
    places = mask.flatten().nonzero()[:, 0].to(values.device, non_blocking=True)
    return values.flatten(0, 1).index_select(0, places)


def checkpoint_blocks(model: CausalModel) -> Any:
    """Turn on activation checkpoints and return the model: a forward pass keeps only the input of
    each block, and the backward pass computes the rest again (Chen et al. 2016)."""
    for block in blocks_of(model):
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(_checkpoint, model, block)
    return model


def compile_blocks(model: CausalModel) -> Any:
    """Have torch.compile compile the blocks of the fused forward at their first use, and return the
    model. Lengths stay variable."""
    # With and without gradients, one row and several, padded and packed, all outputs and some: each
    # combination is a program of its own, and torch's default limit is 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    trunk = model.base_model
    for block, layer in zip(blocks_in(trunk), layers_of(trunk), strict=True):
        block.fused_layer = layer
        compiled = torch.compile(held_block_forward, dynamic=True)
        setattr(block, BLOCK_FORWARD, types.MethodType(compiled, block))
    return model


def blocks_of(model: Trunk | CausalModel) -> list[Any]:
    """Return the transformer blocks of a model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def block_matrices(*models: Any) -> list[Tensor]:
    """Return the weight matrices in the blocks of some models, with those of adapters; a model may
    be None, or an adapter and a head on another's trunk. Embeddings, heads, norms and biases are
    not among them."""
    trunks = [getattr(getattr(model, "view", None), "model", model) for model in models]
    blocks = [block for trunk in trunks if trunk is not None for block in blocks_of(trunk)]
    return [p for block in blocks for p in block.parameters() if p.ndim == 2]


def _checkpoint(model: CausalModel, block: Any, forward: Any, *args: Any) -> Any:
    return checkpoint(
        partial(_in_evaluation_mode, block, forward),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here is random
        context_fn=checkpoint_contexts(model),
    )


def _in_evaluation_mode(block: Any, forward: Any, *args: Any) -> Any:
    """Return the outputs of a block with its own flag in evaluation mode: some blocks (BioGPT,
    Falcon, XGLM) have dropout that goes by it."""
    before, block.training = block.training, False
    try:
        return forward(*args)
    finally:
        block.training = before


@contextmanager
def checkpointing(model: Trunk | CausalModel) -> Iterator[None]:
    """Put checkpointed blocks into training mode inside the context, where gradients are recorded.

    transformers makes activation checkpoints in training mode only. Only the block's own flag is
    set, and not while the block computes: dropout stays in evaluation mode.
    """
    blocks = [block for block in blocks_of(model) if block.gradient_checkpointing]
    for block in blocks:
        block.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
