"""The fused forward of the Llama family: Llama, Mistral, Qwen2, Qwen3.

It computes the same function of the same weights as the transformers module, in fewer and larger
products: real tokens only, the three projections of attention as one, the last block only at the
positions whose outputs are needed. `packed_hidden_states` serves training and scoring;
`generation/decoders.py` samples with the pieces below. A model takes this way if its architecture
is of the family and both forwards agreed on a few tokens, which is checked once per model.

The rotation of positions multiplies pairs of coordinates, read as complex numbers, by e^{iωt} (Su
et al. 2021). The family pairs coordinate j of a head with j + D/2; `rotate` leaves the two of a
pair side by side. Queries and keys are reordered alike, so their dot products stay the same.
"""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm
from torch.utils.checkpoint import checkpoint

from quartet.models.adapters import apply_linear, checkpoint_contexts, is_plain_linear
from quartet.models.attention import causal_attention
from quartet.models.packing import Packed, take
from quartet.models.protocols import Trunk
from quartet.tensors import Float, Int, Tensor

BLOCK_FORWARD = "block_forward"
"""The name under which a block that is sharded or compiled has `block_forward` as a method."""
TRUNK_FORWARD = "trunk_forward"
"""The name under which a trunk that is sharded has `trunk_forward` as a method."""
FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
BF16_DIFFERENCE = 0.05
"""How far apart, relative to their length, two forwards in bfloat16 may leave a token's vector.
They round some nine times a block, by up to 2⁻⁹ each."""
_HAS_FUSED_FORWARD: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def has_fused_forward(trunk: Trunk, width: int) -> bool:
    """Return whether this file computes what the trunk (a transformers base model) does, for
    sequences of up to `width` tokens. Sliding windows are left to transformers where they
    matter."""
    if trunk not in _HAS_FUSED_FORWARD:
        _HAS_FUSED_FORWARD[trunk] = getattr(trunk.config, "model_type", None) in FAMILY and _agrees(
            trunk
        )
    window = getattr(trunk.config, "sliding_window", None)
    return _HAS_FUSED_FORWARD[trunk] and (window is None or width <= window)


@torch.no_grad()
def _agrees(trunk: Trunk) -> bool:
    """Return whether both forwards agree on 12 tokens. Rotations that change with the length of the
    text would pass on so few tokens, and are left to transformers."""
    if trunk.rotary_emb.rope_type in {"dynamic", "longrope"}:
        return False
    count = 12
    device = trunk.embed_tokens.weight.device
    tokens = torch.arange(count, device=device) * 7 % trunk.embed_tokens.weight.shape[0]
    everything = torch.arange(count, device=device)
    ours = packed_hidden_states(
        trunk, Packed(tokens, everything, (count,), count, None, everything)
    )
    theirs = trunk(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    if ours.dtype in {torch.float32, torch.float64}:
        return torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    # In bfloat16 single numbers differ by rounding, which adds up over the layers; a token's vector
    # as a whole keeps its direction and length.
    error = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)
    return bool((error < BF16_DIFFERENCE).all())


# --- whole sequences ---


def packed_hidden_states(trunk: Trunk, packed: Packed) -> Float[Tensor, "n H"]:
    """Return the last hidden states at `packed.output_index`."""
    forward = getattr(trunk, TRUNK_FORWARD, None) or partial(trunk_forward, trunk)
    states: Tensor = forward(packed)
    return states


def trunk_forward(trunk: Trunk, packed: Packed) -> Float[Tensor, "n H"]:
    """Compute what `packed_hidden_states` returns."""
    x = trunk.embed_tokens(packed.tokens)
    rotation = rotations(trunk, packed.positions)
    last, contexts = len(trunk.layers) - 1, checkpoint_contexts(trunk)
    for number, block in enumerate(trunk.layers):
        output_index = packed.output_index if number == last else None
        forward = getattr(block, BLOCK_FORWARD, None) or partial(block_forward, block)
        if getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled():
            x = checkpoint(
                forward, x, rotation, packed, output_index, use_reentrant=False, context_fn=contexts
            )
        else:
            x = forward(x, rotation, packed, output_index)
    return normed(trunk.norm, x)


def rotations(trunk: Trunk, positions: Int[Tensor, "N"]) -> Tensor:
    """Return e^{iωt} of each position t and pair of coordinates: [N, 1, D/2], complex. Its modulus
    is YaRN's scale, 1 for the others."""
    exact = torch.zeros((), dtype=torch.float32, device=positions.device)
    cos, sin = trunk.rotary_emb(exact, positions[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])


def block_forward(
    block: Any, x: Tensor, rotation: Tensor, packed: Packed, output_index: Tensor | None
) -> Tensor:
    """Return the output of one block: x plus attention, plus the multi-layer perceptron of that.

    With `output_index` (the last block) only the rows at these indices go on after attention; the
    others are needed for their keys and values only.
    """
    attention, mlp = block.self_attn, block.mlp
    queries, keys, values = _projected(attention, normed(block.input_layernorm, x), rotation)
    attended = causal_attention(queries, keys, values, packed, attention.scaling).flatten(1)
    if output_index is not None:
        x, attended = take(x, output_index), take(attended, output_index)
    x = x + apply_linear(attention.o_proj, attended)
    h = normed(block.post_attention_layernorm, x)
    return x + apply_linear(
        mlp.down_proj,
        gated(apply_linear(mlp.gate_proj, h), apply_linear(mlp.up_proj, h), mlp.act_fn),
    )


def _projected(attention: Any, h: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of each head, [N, heads, D], the first two rotated."""
    size = attention.head_dim
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    if all(map(is_plain_linear, parts)):
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        projected = linear(h, torch.cat([part.weight for part in parts]), bias)
    else:  # layers under adapters have no weight to concatenate
        projected = torch.cat([apply_linear(part, h) for part in parts], dim=-1)
    heads = projected.unflatten(-1, (-1, size))
    num_kv = attention.k_proj.out_features // size
    # Queries and keys are rotated together, values are not.
    rotating, values = heads[:, :-num_kv], heads[:, -num_kv:]
    if hasattr(attention, "q_norm"):
        queries, keys = rotating[:, :-num_kv], rotating[:, -num_kv:]
        rotating = torch.cat(
            [normed(attention.q_norm, queries), normed(attention.k_norm, keys)], dim=1
        )
    rotated = rotate(rotating, rotation)
    return rotated[:, :-num_kv], rotated[:, -num_kv:], values


def rotate(x: Float[Tensor, "N heads D"], rotation: Tensor) -> Float[Tensor, "N heads D"]:
    """Return x with coordinates j and j + D/2 of each head, read as one complex number, multiplied
    by the rotation. The two come out side by side."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.view_as_real(torch.complex(first, second) * rotation).flatten(-2).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean x² + ε) (Zhang & Sennrich 2019), keeping x and one number per token for

    dx = r (g w − x̂ · mean(g w x̂))    dw = Σ g x̂    with r = 1/√(mean x² + ε), x̂ = r x
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated, and r depends on x
            r = _inverse_rms(x, ctx.eps)
        normed = x * r
        d_weight = (grads[0] * normed).sum(dim=tuple(range(x.ndim - 1)))
        d_normed = grads[0] * weight
        along = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1) / x.shape[-1]
        return torch.addcmul(d_normed, normed, along, value=-1) * r, d_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if torch.is_grad_enabled():
        inverse: Tensor = (norm.square() / x.shape[-1] + eps).rsqrt()
    else:
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return inverse


def normed(norm: Any, x: Tensor) -> Tensor:
    """Return the family's RMSNorm of x. torch's own is one kernel on a GPU and a dozen on a CPU,
    where this file's is used."""
    if x.device.type != "cpu" or x.dtype not in {torch.float32, torch.float64}:
        return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    if not torch.is_grad_enabled():
        return (x * _inverse_rms(x, norm.variance_epsilon)).mul_(norm.weight)
    normalized: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normalized


class _Gated(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020), keeping its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up, d_silu = nn.functional.silu(gate) * grads[0], grads[0] * up
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(d_silu, gate), d_up
        s = gate.sigmoid()  # this gradient will be differentiated, which torch's kernel cannot be
        return d_silu * s * (1 + gate * (1 - s)), d_up


def gated(gate: Tensor, up: Tensor, activation: Any) -> Tensor:
    """Return activation(gate) · up."""
    if not torch.is_grad_enabled():
        activated: Tensor = activation(gate)
        return activated.mul_(up)
    product: Tensor
    if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
        product = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    product = activation(gate) * up
    return product
