"""The fused forward: the computation of the transformers module from the same weights, in fewer and
larger products.

Only real tokens are computed, the projections of attention are one product, and the last block is
computed only at the positions whose outputs are needed. `packed_hidden_states` serves training and
scoring; `generation/decoders.py` samples with the pieces below. A model takes this way if its
architecture is a row of `models/architectures.py` and both forwards agreed on a few tokens, which
is checked once per model.

The rotation of positions multiplies pairs of coordinates, read as complex numbers, by e^{iωt} (Su
et al. 2021). Coordinate j of the R coordinates that are rotated is paired with j + R/2; `rotate`
leaves the two of a pair side by side. Queries and keys are reordered alike, so their dot products
stay the same.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from quartet.models.adapters import apply_linear, checkpoint_contexts, is_plain_linear
from quartet.models.architectures import (
    ARCHITECTURES,
    Architecture,
    Layer,
    describe,
    longest_fused,
    why_not_fused,
)
from quartet.models.attention import causal_attention
from quartet.models.elementwise import gated, normed
from quartet.models.experts import expert_mlp, has_experts
from quartet.models.packing import Packed, pack, take
from quartet.models.protocols import Trunk
from quartet.tensors import Float, Int, Tensor

BLOCK_FORWARD = "block_forward"
"""The name under which a block that is sharded or compiled has `block_forward` as a method."""
TRUNK_FORWARD = "trunk_forward"
"""The name under which a trunk that is sharded has `trunk_forward` as a method."""
log = logging.getLogger(__name__)
DIFFERENCE, BF16_DIFFERENCE = 1e-4, 0.05
"""How far apart, relative to its length, two forwards may leave a token's vector in float32, and
the vectors of all tokens together in bfloat16. There they round some nine times a block, by up to
2⁻⁹ each, and a single token's can be off by more."""
ROUTED_DIFFERENCE = 0.3
"""The same in bfloat16 with experts: where two experts are nearly equal for a token, rounding
decides which of them it is sent to."""
CHECKED_TOKENS = 12
"""How many tokens both forwards are compared on."""
CHECKED_WINDOW = 5
"""How wide sliding windows are in that comparison, so that they matter."""
_HAS_FUSED_FORWARD: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def has_fused_forward(trunk: Trunk, width: int) -> bool:
    """Return whether this file computes what the trunk (a transformers base model) does, for
    sequences of up to `width` tokens."""
    if trunk not in _HAS_FUSED_FORWARD:
        config = getattr(trunk, "config", None)
        is_known = why_not_fused(config) is None
        _HAS_FUSED_FORWARD[trunk] = is_known and _agrees(trunk)
        if is_known and not _HAS_FUSED_FORWARD[trunk]:
            log.warning(
                "%s: Quartet's forward pass and transformers' differ by more than rounding on this "
                "device. transformers' is used, which is slower.",
                trunk.config.model_type,
            )
    if not _HAS_FUSED_FORWARD[trunk]:
        return False
    longest = longest_fused(trunk.config)
    return longest is None or width <= longest


@torch.no_grad()
def _agrees(trunk: Any) -> bool:
    """Return whether both forwards agree on two rows of a few tokens, which are more than the
    windows are wide for the time of the comparison. The rows begin alike, so that the second takes
    that part from the first."""
    cap = row_of(trunk).score_cap
    if cap is not None and getattr(trunk.config, cap):
        # In transformers 5.17 its other kinds of attention leave the cap out.
        trunk.set_attn_implementation("eager")
    count, vocabulary = CHECKED_TOKENS, submodule(trunk, row_of(trunk).embedding).weight.shape[0]
    tokens = torch.arange(count).repeat(2, 1) * 7
    tokens[1, count // 2 :] += 1
    tokens, asked = tokens % vocabulary, torch.zeros(2, count, dtype=torch.bool)
    asked[:, count // 2 :] = True
    device = next(trunk.parameters()).device
    with _narrow_windows(trunk.config):
        ours = packed_hidden_states(trunk, pack(tokens, asked, device))
        states = trunk(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        theirs = states[:, count // 2 :].flatten(0, 1)
    # Single numbers differ by rounding, which adds up over the layers; a token's vector as a whole
    # keeps its direction and length.
    error, size = ((x.float()).norm(dim=-1) for x in (ours - theirs, theirs))
    if ours.dtype in {torch.float32, torch.float64}:
        return bool((error <= DIFFERENCE * size).all())
    allowed = BF16_DIFFERENCE if row_of(trunk).experts is None else ROUTED_DIFFERENCE
    return bool(error.norm() <= allowed * size.norm())


@contextmanager
def _narrow_windows(config: Any) -> Iterator[None]:
    """Make sliding windows narrow inside the context. transformers' masks come from the config;
    flash attention reads the window from each module, and is compared as it is."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "_attn_implementation", None) not in {"sdpa", "eager"}:
        yield
        return
    config.sliding_window = min(window, CHECKED_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


# --- the modules of a trunk ---


def row_of(trunk: Trunk) -> Architecture:
    return ARCHITECTURES[trunk.config.model_type]


def submodule(module: Any, path: str) -> Any:
    """Return a module inside another by its dotted name."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def blocks_in(trunk: Trunk) -> Any:
    """Return the transformer blocks of a trunk in order."""
    return submodule(trunk, row_of(trunk).blocks)


def mlp_of(block: Any, row: Architecture) -> Any:
    return block if row.mlp is None else getattr(block, row.mlp)


def layers_of(trunk: Trunk) -> tuple[Layer, ...]:
    """Return what each block of a trunk computes."""
    row = row_of(trunk)
    scales = [float(getattr(block, row.attention).scaling) for block in blocks_in(trunk)]
    return describe(trunk.config, scales, hasattr(trunk, "rotary_emb"))


# --- whole sequences ---


def packed_hidden_states(trunk: Trunk, packed: Packed) -> Float[Tensor, "n H"]:
    """Return the last hidden states at `packed.output_index`."""
    forward = getattr(trunk, TRUNK_FORWARD, None) or partial(trunk_forward, trunk)
    states: Tensor = forward(packed)
    return states


def trunk_forward(trunk: Trunk, packed: Packed) -> Float[Tensor, "n H"]:
    """Compute what `packed_hidden_states` returns."""
    row, layers = row_of(trunk), layers_of(trunk)
    x = embedded(trunk, packed)
    turns = {key: rotations(trunk, packed.positions, key) for key in rotations_of(layers)}
    last, contexts = len(layers) - 1, checkpoint_contexts(trunk)
    for number, (block, layer) in enumerate(zip(blocks_in(trunk), layers, strict=True)):
        output_index = packed.output_index if number == last else None
        forward = getattr(block, BLOCK_FORWARD, None) or partial(block_forward, block)
        rotation = None if layer.rotation is None else turns[layer.rotation]
        inputs = (layer, x, rotation, packed, output_index)
        if getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled():
            # Nothing in a block is random. Random numbers would be set back while others are drawn:
            # they are the process's, and its threads share them.
            x = checkpoint(
                forward,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
        else:
            x = forward(*inputs)
    return normed(submodule(trunk, row.last_norm), x, row.norm)


def embedded(trunk: Trunk, packed: Packed) -> Float[Tensor, "N H"]:
    """Return the vectors of tokens, and of their positions where these are learned."""
    row = row_of(trunk)
    x: Tensor = submodule(trunk, row.embedding)(packed.tokens)
    if row.embedding_scale is not None:
        x = x * getattr(trunk.config, row.embedding_scale)
    if row.positions is not None:
        table = submodule(trunk, row.positions).weight
        x = x + embedding(packed.positions + row.position_offset, table)
    return x


def rotations_of(layers: tuple[Layer, ...]) -> set[str]:
    """Return the keys of the rotations that a model has."""
    return {layer.rotation for layer in layers if layer.rotation is not None}


def rotations(trunk: Trunk, positions: Int[Tensor, "N"], key: str = "") -> Tensor:
    """Return e^{iωt} of each position t and pair of coordinates: [N, 1, R/2], complex. Its modulus
    is the scale of YaRN and LongRoPE, 1 for the others."""
    exact = torch.zeros((), dtype=torch.float32, device=positions.device)
    kind = {"layer_type": key} if key else {}
    cos, sin = trunk.rotary_emb(exact, positions[None], **kind)
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])


def block_forward(
    block: Any,
    layer: Layer,
    x: Tensor,
    rotation: Tensor | None,
    packed: Packed,
    output_index: Tensor | None,
) -> Tensor:
    """Return the output of one block: x plus attention, plus the multi-layer perceptron of that.

    With `output_index` (the last block) only the rows at these indices go on after attention; the
    others are needed for their keys and values only.
    """
    row = layer.row
    attention = getattr(block, row.attention)
    queries, keys, values = _projected(
        attention, layer, _normed_by(block, row.before_attention, row, x), rotation
    )
    attended = causal_attention(
        queries, keys, values, packed, layer.scale, layer.window, layer.cap
    ).flatten(1)
    if output_index is not None:
        x, attended = take(x, output_index), take(attended, output_index)
    attended = apply_linear(getattr(attention, row.out), attended)
    attended = _normed_by(block, row.after_attention, row, attended)
    before_mlp = norm_before_mlp(block, layer)
    if layer.parallel:
        return x + attended + _mlp(block, row, _normed_by(block, before_mlp, row, x))
    x = _added(x, attended, layer.residual)
    out = _mlp(block, row, _normed_by(block, before_mlp, row, x))
    return _added(x, _normed_by(block, row.after_mlp, row, out), layer.residual)


def held_block_forward(
    block: Any, _: Layer, x: Tensor, rotation: Tensor | None, packed: Packed, index: Tensor | None
) -> Tensor:
    """Return `block_forward` with the layer that the block holds: for torch.compile, the numbers of
    a module are constants, and those of an argument are not."""
    return block_forward(block, block.fused_layer, x, rotation, packed, index)


def norm_before_mlp(block: Any, layer: Layer) -> str | None:
    """Return the name of the norm of the MLP's input. Where attention and MLP are parallel, a block
    may have one norm for both."""
    row = layer.row
    if layer.parallel and row.before_mlp and getattr(block, row.before_mlp) is None:
        return row.before_attention
    return row.before_mlp


def _normed_by(block: Any, name: str | None, row: Architecture, x: Tensor) -> Tensor:
    """Return x under the norm of this name; without a name, x."""
    return x if name is None else normed(getattr(block, name), x, row.norm)


def _added(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x + y if scale == 1 else x + y * scale


def _mlp(block: Any, row: Architecture, h: Tensor) -> Tensor:
    """Return the output of a block's multi-layer perceptron."""
    mlp = mlp_of(block, row)
    if has_experts(mlp, row):
        return expert_mlp(mlp, h)
    activation = getattr(mlp, row.activation)
    up = [apply_linear(getattr(mlp, name), h) for name in row.up]
    if row.gated:
        gate, linear_up = up if len(up) == 2 else up[0].chunk(2, dim=-1)
        inner = gated(gate, linear_up, activation)
    else:
        inner = activation(up[0])
    return apply_linear(getattr(mlp, row.down), inner)


def _projected(
    attention: Any, layer: Layer, h: Tensor, rotation: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of each head, [N, heads, D], the first two rotated."""
    row, num_kv = layer.row, layer.kv_heads
    heads = by_role(_joint_projection(attention, layer.row, h), layer)
    # Queries and keys are rotated together, values are not.
    rotating, values = heads[:, :-num_kv], heads[:, -num_kv:]
    if row.head_norms is not None:
        queries, keys = rotating[:, :-num_kv], rotating[:, -num_kv:]
        rotating = torch.cat(
            [
                _normed_heads(getattr(attention, name), x, row)
                for name, x in zip(row.head_norms, (queries, keys), strict=True)
            ],
            dim=1,
        )
    rotated = rotating if rotation is None else rotate(rotating, rotation)
    return rotated[:, :-num_kv], rotated[:, -num_kv:], values


def _joint_projection(attention: Any, row: Architecture, h: Tensor) -> Tensor:
    """Return the outputs of all projections to queries, keys and values side by side."""
    parts = [getattr(attention, name) for name in row.qkv]
    if len(parts) == 1:
        return apply_linear(parts[0], h)
    if all(map(is_plain_linear, parts)):
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return linear(h, torch.cat([part.weight for part in parts]), bias)
    # layers under adapters have no weight to concatenate
    return torch.cat([apply_linear(part, h) for part in parts], dim=-1)


def by_role(projected: Tensor, layer: Layer) -> Float[Tensor, "N heads D"]:
    """Return joint projections as heads: those of queries, then of keys, then of values."""
    heads: Tensor = projected.unflatten(-1, (-1, layer.head_size))
    if layer.row.by_head:
        heads = heads.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
    return heads


def _normed_heads(norm: Any, x: Float[Tensor, "N heads D"], row: Architecture) -> Tensor:
    if row.norms_all_heads:
        together: Tensor = normed(norm, x.flatten(1), row.norm).unflatten(1, x.shape[1:])
        return together
    return normed(norm, x, row.norm)


def rotate(x: Float[Tensor, "N heads D"], rotation: Tensor) -> Float[Tensor, "N heads D"]:
    """Return x with coordinates j and j + R/2 of each head, read as one complex number, multiplied
    by the rotation. The two come out side by side; coordinates from R on stay as they are."""
    size = 2 * rotation.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else x.tensor_split([size], dim=-1)
    first, second = turned.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.view_as_real(torch.complex(first, second) * rotation).flatten(-2).to(x.dtype)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)
