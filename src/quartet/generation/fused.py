"""The weights of a Llama's blocks, joined for few large products, as decoders use them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm

from quartet.models.adapters import has_merged_weight, merged_weight
from quartet.models.llama import gated, normed
from quartet.models.logprobs import head_logits
from quartet.models.protocols import CausalModel
from quartet.tensors import Float, Tensor


class FusedBlock:
    """One transformer block, its weights joined for few large products: queries, keys and values in
    one, gate and up in one. Rows of the query and key weights are reordered so that the two
    coordinates that a rotation mixes, j and j + D/2, are neighbours; then a pair is one complex
    number."""

    def __init__(self, block: Any, num_rotated: int) -> None:
        """`num_rotated`: query and key heads; the value heads come after them."""
        attention, mlp = block.self_attn, block.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.head_size, self.num_rotated = attention.head_dim, num_rotated
        paired = [
            lambda x: x.unflatten(0, (-1, 2, self.head_size // 2)).transpose(1, 2).flatten(0, 2)
        ] * 2
        self.qkv = FusedLinear(parts, [*paired, lambda x: x])
        self.out, self.gate_up, self.down = (
            FusedLinear([attention.o_proj]),
            FusedLinear([mlp.gate_proj, mlp.up_proj]),
            FusedLinear([mlp.down_proj]),
        )
        self.activation = mlp.act_fn
        self.norms = HeldNorm(block.input_layernorm), HeldNorm(block.post_attention_layernorm)
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [
                paired[0](norm.weight).expand(part.out_features // self.head_size, -1)
                for norm, part in zip((attention.q_norm, attention.k_norm), parts, strict=False)
            ]
            self.head_norm, self.head_eps = torch.cat(weights), attention.q_norm.variance_epsilon

    def project_qkv(self, x: Float[Tensor, "N H"], factors: Tensor) -> Float[Tensor, "N heads D"]:
        """Return queries, keys and values of every head, queries and keys rotated."""
        heads: Tensor = self.qkv(normed(self.norms[0], x)).unflatten(-1, (-1, self.head_size))
        if self.head_norm is not None:  # Qwen3 normalizes each query and key head
            rotated = heads[:, : self.num_rotated]
            rotated.copy_(
                rms_norm(rotated, (self.head_size,), None, self.head_eps) * self.head_norm
            )
        # Complex numbers exist for float32 and float64; bf16 is rotated in float32, as transformers
        # does.
        exact = heads.to(torch.promote_types(heads.dtype, torch.float32))
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(factors)
        return exact.to(heads.dtype)

    def residuals(
        self, x: Float[Tensor, "N H"], attended: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N H"]:
        """Return x + the output projection of `attended` + the MLP of that sum: the block's two
        residual additions."""
        x = self.out.added_to(x, attended)
        gate, up = self.gate_up(normed(self.norms[1], x)).chunk(2, dim=-1)
        return self.down.added_to(x, gated(gate, up, self.activation))


class HeldNorm:
    """The weight of a norm in the dtype that it computes in, read once."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon


def head_and_embedding(model: CausalModel) -> tuple["FusedLinear", Tensor]:
    """Return the output head of a model and the table of its embeddings, which are one tensor where
    the model ties them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head._parameters["weight"] is embedding._parameters["weight"]
    table: Tensor = embedding.weight
    return FusedLinear([head], weight=table if tied else None), table


class FusedLinear:
    """x Wᵀ + b, W being the weights of one linear layer or of several, one below the other.

    On a CPU, oneDNN's kernels with W in their own layout are up to three times as fast for few rows
    as the kernels that torch chooses. For a W below `PACKED` numbers, calling them costs more than
    they save.
    """

    PACKED = 2**16

    def __init__(
        self, layers: Sequence[Any], reorder: Sequence[Any] = (), weight: Tensor | None = None
    ) -> None:
        """`reorder` has a function per layer that permutes the rows of its weight and bias.
        `weight` is that of a single layer where it is known already."""
        reorder = reorder or [lambda x: x] * len(layers)
        if weight is None:
            weights = [f(merged_weight(layer)) for f, layer in zip(reorder, layers, strict=True)]
        else:
            weights = [weight]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = None
        if getattr(layers[0], "bias", None) is not None:
            self.bias = torch.cat(
                [
                    f(getattr(layer, "base_layer", layer).bias)
                    for f, layer in zip(reorder, layers, strict=True)
                ]
            )
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self.packed = (
            on_cpu and self.weight.numel() >= self.PACKED and torch.backends.mkldnn.is_available()
        )
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)

    def __call__(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        if self.packed:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return output
        return linear(x, self.weight, self.bias)

    def added_to(self, x: Float[Tensor, "N M"], y: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        """Return x + y Wᵀ + b. On a GPU in half precision the sum is part of the product, and x is
        overwritten."""
        if x.device.type == "cpu" or x.dtype == torch.float32:
            return self(y).add_(x)
        if self.bias is not None:
            x = x + self.bias
        return x.addmm_(y, self.weight.t())

    def in_float32(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        """Return x Wᵀ + b in float32 at least, of bfloat16 numbers too."""
        return self(x) if self.packed else head_logits(x, self.weight, self.bias)


def has_merged_weights(trunk: Any) -> bool:
    """Return whether each projection is a weight matrix, or one plus a LoRA that can be merged."""
    products = (
        product
        for block in trunk.layers
        for part in (block.self_attn, block.mlp)
        for name, product in part.named_children()
        if name.endswith("_proj")
    )
    return all(has_merged_weight(product) for product in products)
