"""The weights of a model's blocks, joined for few large products, and what both decoders on a cache
of their own have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import embedding, linear, rms_norm

from quartet.generation.cache import (
    LOGITS_HELD,
    LOGITS_HELD_ON_GPU,
    MIN_ROWS,
    WIDE_WEIGHT,
    cache_bytes,
)
from quartet.models.adapters import (
    apply_linear,
    has_merged_weight,
    has_plain_lora,
    merged_weight,
)
from quartet.models.architectures import Layer
from quartet.models.attention import causal_attention
from quartet.models.elementwise import HeldNorm, gated
from quartet.models.experts import expert_mlp, has_experts, held_mlp
from quartet.models.forward import logit_shape
from quartet.models.fused import (
    blocks_in,
    layers_of,
    mlp_of,
    norm_before_mlp,
    rotations,
    rotations_of,
    row_of,
    submodule,
)
from quartet.models.logprobs import head_logits
from quartet.models.packing import Packed, take
from quartet.models.precision import compute_dtype
from quartet.models.protocols import CausalModel, Trunk
from quartet.models.quantize import NF4Linear
from quartet.tensors import Float, Int, Tensor


class FusedBlock:
    """One transformer block, its weights joined for few large products: queries, keys and values in
    one, gate and up in one. Rows of the query and key weights are reordered so that the two
    coordinates that a rotation mixes are neighbours; then a pair is one complex number."""

    def __init__(self, block: Any, layer: Layer, rotated: int) -> None:
        """`rotated`: how many coordinates of a head the rotation mixes."""
        row = layer.row
        attention, mlp = getattr(block, row.attention), mlp_of(block, row)
        self.layer, self.num_rotated = layer, layer.heads + layer.kv_heads
        rotates = rotated if layer.rotation is not None else 0

        def paired(x: Tensor) -> Tensor:
            """Reorder the coordinates [heads, D, …] of each head."""
            if not rotates:
                return x
            pairs = x[:, :rotates].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            return pairs if rotates == x.shape[1] else torch.cat([pairs, x[:, rotates:]], dim=1)

        def arranged(x: Tensor) -> Tensor:
            """Order the rows of the joint projection by role, and those of rotated heads by
            pairs."""
            heads = x.unflatten(0, (-1, layer.head_size))
            if row.by_head:
                heads = heads.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            turned, values = heads.tensor_split([self.num_rotated])
            return torch.cat([paired(turned), values]).flatten(0, 1)

        self.qkv = product_of([getattr(attention, name) for name in row.qkv], arranged)
        self.out = product_of([getattr(attention, row.out)])
        self.up: Product | None = None
        """None: the MLP is a mixture of experts."""
        self.down: Product | RoutedExperts
        if has_experts(mlp, row):
            self.down = RoutedExperts(mlp)
        else:
            self.up = product_of([getattr(mlp, name) for name in row.up])
            self.down = product_of([getattr(mlp, row.down)])
            self.activation = getattr(mlp, row.activation)

        def held(name: str | None) -> HeldNorm | None:
            return None if name is None else HeldNorm(getattr(block, name), row.norm)

        self.before_attention, self.after_attention = (
            held(row.before_attention),
            held(row.after_attention),
        )
        self.before_mlp, self.after_mlp = held(norm_before_mlp(block, layer)), held(row.after_mlp)
        self.head_norms: list[Tensor] = []
        if row.head_norms is not None:
            norms = [HeldNorm(getattr(attention, name), row.norm) for name in row.head_norms]
            self.head_eps = norms[0].eps
            weights = [
                paired(norm.weight.view(-1, layer.head_size)).expand(count, -1)
                for norm, count in zip(norms, (layer.heads, layer.kv_heads), strict=True)
            ]
            self.head_norms = weights if row.norms_all_heads else [torch.cat(weights)]

    def project_qkv(
        self, x: Float[Tensor, "N H"], factors: Tensor | None
    ) -> Float[Tensor, "N heads D"]:
        """Return queries, keys and values of every head, queries and keys rotated."""
        x = x if self.before_attention is None else self.before_attention(x)
        heads: Tensor = self.qkv(x).unflatten(-1, (-1, self.layer.head_size))
        start = 0
        for weight in self.head_norms:  # of all queries and keys, or of queries and then of keys
            part = heads[:, start : start + len(weight)]
            start += len(weight)
            sizes = weight.shape if self.layer.row.norms_all_heads else weight.shape[-1:]
            # Rounded once, behind the weights, as the learner's norm is.
            exact = part.to(torch.promote_types(part.dtype, torch.float32))
            torch.mul(rms_norm(exact, tuple(sizes), None, self.head_eps), weight, out=part)
        if factors is None:
            return heads
        # Complex numbers exist for float32 and float64; bf16 is rotated in float32, as transformers
        # does.
        exact = heads.to(torch.promote_types(heads.dtype, torch.float32))
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(factors)
        return exact.to(heads.dtype)

    def residuals(
        self, x: Float[Tensor, "N H"], attended: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N H"]:
        """Return x + the output projection of `attended` + the MLP of that sum: the block's two
        residual additions. Where they are parallel, the MLP is that of x."""
        if self.layer.parallel:
            inner = self._inner(x)  # before a sum may overwrite x
            return self.down.added_to(self.out.added_to(x, attended), inner)
        x = self._added(x, self.out, attended, self.after_attention)
        return self._added(x, self.down, self._inner(x), self.after_mlp)

    def _inner(self, x: Tensor) -> Tensor:
        """Return what the last layer of the MLP reads."""
        x = x if self.before_mlp is None else self.before_mlp(x)
        if self.up is None:
            return x
        up = self.up(x)
        if not self.layer.row.gated:
            activated: Tensor = self.activation(up)
            return activated
        gate, linear_up = up.chunk(2, dim=-1)
        return gated(gate, linear_up, self.activation)

    def _added(
        self, x: Tensor, product: "Product | RoutedExperts", y: Tensor, norm: HeldNorm | None
    ) -> Tensor:
        """Return x + the product of y, under the norm of outputs and times the residual scale where
        the architecture has them."""
        if norm is None and self.layer.residual == 1:
            return product.added_to(x, y)
        out = product(y)
        out = out if norm is None else norm(out)
        return x + out if self.layer.residual == 1 else x.add(out, alpha=self.layer.residual)


class HeldEmbedding:
    """The table of a model's embeddings, with their scale and the table of learned positions, read
    once."""

    def __init__(self, model: CausalModel, num_positions: int) -> None:
        trunk = model.base_model
        row, module = row_of(trunk), model.get_input_embeddings()
        self.table: Tensor = module.weight
        # Gemma's own scale is rounded to the dtype of the embeddings.
        own = getattr(module, "embed_scale", None)
        self.scale = 1.0 if own is None else float(own.to(self.table.dtype))
        if row.embedding_scale is not None:
            self.scale *= float(getattr(trunk.config, row.embedding_scale))
        self.positions: Tensor | None = None
        if row.positions is not None:
            learned = submodule(trunk, row.positions).weight[row.position_offset :]
            # A row that has ended may grow past the last position; nothing reads what it gets.
            places = torch.arange(num_positions, device=learned.device).clamp(max=len(learned) - 1)
            self.positions = learned[places]

    def __call__(self, tokens: Int[Tensor, "N"], places: Int[Tensor, "N"]) -> Float[Tensor, "N H"]:
        x = embedding(tokens, self.table)
        if self.scale != 1:
            x = x * self.scale
        return x if self.positions is None else x + embedding(places, self.positions)


class FusedLinear:
    """x Wᵀ + b, W being the weights of one linear layer or of several, one below the other.

    On a CPU, oneDNN's kernels with W in their own layout are up to three times as fast for few rows
    as the kernels that torch chooses. For a W below `PACKED` numbers, calling them costs more than
    they save. One of `WIDE_WEIGHT` numbers, the head of a large vocabulary, stays in its own
    layout: the kernels took 0.42 s for 32 rows of 262,144 × 640 instead of 0.36 s, but the other
    layout is a copy of 671 MB that takes 1.1 s to make, before each rollout.
    """

    PACKED = 2**16

    def __init__(
        self,
        layers: Sequence[Any],
        reorder: Callable[[Tensor], Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """`reorder` permutes the rows of the joint weight and bias. `weight` is that of a single
        layer where it is known already."""
        if weight is None:
            weights = [merged_weight(layer) for layer in layers]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = weight if reorder is None else reorder(weight)
        self.bias = None
        plain = [getattr(layer, "base_layer", layer) for layer in layers]
        if getattr(plain[0], "bias", None) is not None:
            bias = torch.cat([layer.bias for layer in plain])
            self.bias = bias if reorder is None else reorder(bias)
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self.packed = (
            on_cpu and self.weight.numel() >= self.PACKED and torch.backends.mkldnn.is_available()
        )
        if self.packed and self.weight.numel() < WIDE_WEIGHT:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 64)

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


class LinearsInTurn:
    """What FusedLinear computes, of layers whose weights are in 4 bits: each layer by itself, as
    the learner does, with its adapter beside it."""

    def __init__(
        self, layers: Sequence[Any], reorder: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.layers, self.order = layers, None
        if reorder is not None:
            plain = [getattr(layer, "base_layer", layer) for layer in layers]
            outputs = torch.arange(sum(layer.out_features for layer in plain))
            self.order = reorder(outputs).to(plain[0].weight.device)

    def __call__(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        products = [apply_linear(layer, x) for layer in self.layers]
        joined = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return joined if self.order is None else joined.index_select(-1, self.order)

    def added_to(self, x: Float[Tensor, "N M"], y: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        """Return x plus the product of y."""
        return x + self(y)


class RoutedExperts:
    """An MLP of experts, by its own forward, in the place of its last product."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = held_mlp(mlp)

    def __call__(self, x: Float[Tensor, "N H"]) -> Float[Tensor, "N H"]:
        return expert_mlp(self.mlp, x)

    def added_to(self, x: Float[Tensor, "N H"], y: Float[Tensor, "N H"]) -> Float[Tensor, "N H"]:
        """Return x plus the output for y."""
        return x + self(y)


Product = FusedLinear | LinearsInTurn


def product_of(layers: Sequence[Any], reorder: Callable[[Tensor], Tensor] | None = None) -> Product:
    """Return the joint product of linear layers, its outputs reordered as rows of their weights."""
    if all(map(has_merged_weight, layers)):
        return FusedLinear(layers, reorder)
    return LinearsInTurn(layers, reorder)


def has_products(trunk: Trunk) -> bool:
    """Return whether `product_of` takes each projection: it is a weight matrix, or one plus a LoRA
    that can be merged, or in 4 bits."""
    row = row_of(trunk)
    attentions = [getattr(block, row.attention) for block in blocks_in(trunk)]
    mlps = [mlp_of(block, row) for block in blocks_in(trunk)]
    layers = [getattr(part, name) for part in attentions for name in (*row.qkv, row.out)]
    layers += [
        getattr(part, name)
        for part in mlps
        if not has_experts(part, row)
        for name in (*row.up, row.down)
    ]
    return all(
        has_merged_weight(layer) or has_plain_lora(layer) or isinstance(layer, NF4Linear)
        for layer in layers
    )


class FusedDecoder:
    """What the decoders have in common that own their cache: the model's weights, joined, and
    whole prompts. Subclasses lay out the cache and compute a step."""

    def __init__(
        self, model: CausalModel, width: int, max_rows: int | None, columns: int | None = None
    ) -> None:
        """Texts have up to `width` tokens; a row of the cache has `columns` of them, by default as
        many. By default `max_rows` is what memory holds."""
        trunk, columns = model.base_model, columns or width
        self.width, self.device, self.dtype = columns, model.device, compute_dtype(model)
        layers = layers_of(trunk)
        self.heads, self.kv_heads = layers[0].heads, layers[0].kv_heads
        self.head_size = layers[0].head_size
        # Rows that have ended may grow past the width; no table has to be longer for their sake.
        places = torch.arange(columns, device=self.device).clamp(max=width - 1)
        turns = {key: rotations(trunk, places, key) for key in rotations_of(layers)}
        self.factors = {key: self._factors(turn) for key, turn in turns.items()}
        self.blocks = [
            FusedBlock(block, layer, 2 * turns[layer.rotation].shape[-1])
            if layer.rotation is not None
            else FusedBlock(block, layer, 0)
            for block, layer in zip(blocks_in(trunk), layers, strict=True)
        ]
        self.embedding = HeldEmbedding(model, columns)
        head = model.get_output_embeddings()
        tied = head._parameters["weight"] is model.get_input_embeddings()._parameters["weight"]
        self.head = FusedLinear([head], weight=self.embedding.table if tied else None)
        self.logit_shape = logit_shape(model)
        row = row_of(trunk)
        self.norm = HeldNorm(submodule(trunk, row.last_norm), row.norm)
        numbers = len(layers) * 2 * self.kv_heads * self.head_size * columns
        held = LOGITS_HELD_ON_GPU if self.device.type == "cuda" else LOGITS_HELD
        row_bytes = numbers * self.dtype.itemsize + held * len(self.embedding.table) * 4
        fit = cache_bytes(self.device) // row_bytes
        self.max_rows = max_rows or max(fit, MIN_ROWS)
        self.caches: list[Tensor] = []
        """The keys and values of each block."""

    def _factors(self, turns: Tensor) -> Tensor:
        """Return the factors that rotate queries and keys at each position: [n, heads + 2 · kv
        heads, D/2], complex. What is not rotated has the factor 1, so that one product rotates the
        joint projection in place."""
        rest = self.head_size // 2 - turns.shape[-1]
        factors = torch.nn.functional.pad(turns, (0, rest), value=1.0)
        factors = factors.expand(-1, self.heads + self.kv_heads, -1)
        ones = factors.new_ones(len(turns), self.kv_heads, self.head_size // 2)
        return torch.cat([factors, ones], dim=1)

    def _factors_at(self, places: Int[Tensor, "N"]) -> dict[str | None, Tensor | None]:
        """Return the factors of these positions by the key of their rotation."""
        return {None: None} | {key: table[places] for key, table in self.factors.items()}

    def _store(
        self,
        cache: Tensor,
        slots: Int[Tensor, "N"],
        places: Int[Tensor, "N"],
        keys_and_values: Float[Tensor, "N kv2 D"],
    ) -> None:
        """Write the keys and values of tokens into the cache."""
        raise NotImplementedError

    def _prefill_packed(self, packed: Packed, slots: Int[Tensor, "N"]) -> Float[Tensor, "B V"]:
        """Compute packed prompts, write their keys and values into the slot of each token, and
        return the logits behind each prompt's last token."""
        factors = self._factors_at(packed.positions)
        x = self.embedding(packed.tokens, packed.positions)
        for number, (block, cache) in enumerate(zip(self.blocks, self.caches, strict=True)):
            layer = block.layer
            heads = block.project_qkv(x, factors[layer.rotation])
            self._store(cache, slots, packed.positions, heads[:, self.heads :])
            queries, keys, values = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            attended = causal_attention(
                queries, keys, values, packed, layer.scale, layer.window, layer.cap
            ).flatten(1)
            # The last block's output is needed only behind the last token of each prompt.
            if number == len(self.blocks) - 1:
                x, attended = take(x, packed.output_index), take(attended, packed.output_index)
            x = block.residuals(x, attended)
        return self._logits(x)

    def _logits(self, x: Float[Tensor, "B H"]) -> Float[Tensor, "B V"]:
        return self.logit_shape.applied_to(self.head.in_float32(self.norm(x)))
