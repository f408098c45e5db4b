"""Decoders: a language model with a key-value cache, as the native generator uses it.

A decoder takes prompts in (`prefill`), appends one token to every row (`step`) and drops finished
rows (`keep`). `PlainDecoder` calls the model's own forward with transformers' cache and works for
any architecture. `LlamaDecoder` computes the Llama family itself, on a cache that it owns: rows
need no padding, and new rows can join while others are being decoded.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention
from transformers import DynamicCache

from quartet.models.adapters import has_merged_weight, merged_weight
from quartet.models.language_model import has_linear_head
from quartet.models.llama import causal_attention, gated, has_fused_forward, normed, rotations
from quartet.models.logprobs import head_logits
from quartet.models.packing import Packed, pack_rows, repacked, take
from quartet.models.padding import left_pad
from quartet.models.precision import compute_dtype
from quartet.models.protocols import CausalModel
from quartet.tensors import Bool, Float, Int, Tensor

BLOCK = 64
"""A cache is lengthened by a multiple of this many columns (tokens)."""

MIN_ROWS = 64
"""Rows that are decoded together however large their keys and values are. With fewer rows, reading
the weights for each step would cost more than the memory is worth."""

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass of the prefill; a longer prompt has a pass of its own."""


@runtime_checkable
class Decoder(Protocol):
    """A batch of texts, the rows, each of which grows by one token per step. Rows are numbered
    0, 1, … in the order in which they were added."""

    def free_rows(self) -> int:
        """Return how many rows can be added now."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        """Add `copies` rows for each prompt, next to each other, and return the logits of each new
        row's first response token."""
        ...

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Append a token to every row and return the logits of the token after it."""
        ...

    def keep(self, unfinished: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        """Drop the other rows. The rows that remain may change places: entry i of the result is the
        old number of the row that is now row i."""
        ...


def make_decoder(model: CausalModel, width: int, max_rows: int | None = None) -> Decoder:
    """Return the fastest decoder for this model. Texts have up to `width` tokens; at most
    `max_rows` rows are decoded together, by default as many as memory holds."""
    if (
        has_fused_forward(model.base_model, width)
        and has_linear_head(model)
        and _has_merged_weights(model.base_model)
    ):
        return LlamaDecoder(model, width, max_rows)
    return PlainDecoder(model, max_rows)


class PlainDecoder:
    """Decodes with the forward pass of any causal language model of transformers. Prompts are
    padded on the left, so that all rows end in the same column. Its cache has one length, so new
    rows can be added only when no old row is left."""

    def __init__(self, model: CausalModel, max_rows: int | None = None) -> None:
        self.model, self.max_rows = model, max_rows or 512
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self.cache: Any = None

    def free_rows(self) -> int:
        return 0 if len(self.mask) else self.max_rows

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        self.cache = DynamicCache(config=self.model.config)
        ids, self.mask = left_pad(prompts, self.model.device)
        logits = self._forward(ids)
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self.mask = self.mask.repeat_interleave(copies, 0)
        return logits.repeat_interleave(copies, 0)

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        self.mask = pad(self.mask, (0, 1), value=True)
        return self._forward(tokens[:, None])

    def keep(self, unfinished: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        kept = unfinished.nonzero()[:, 0]
        if len(kept):
            self.cache.batch_select_indices(kept)
        self.mask = self.mask[kept]
        return kept

    def _forward(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B V"]:
        """Return the logits behind each row's last token."""
        # Positions count real tokens: padding on the left must not shift a text. The clamp is for
        # the padding itself, whose outputs nothing reads.
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        logits: Tensor = output.logits
        return logits[:, -1]


class LlamaDecoder:
    """Decodes the Llama family on a cache of its own, one slot per row, without padding.

    Each block's cache is one tensor [slots, 2 · kv heads, columns, D], the keys before the values.
    Row i is in slot i. When a row leaves, the last row moves into its slot, so at most one slot is
    copied per row that leaves. Columns are added `BLOCK` at a time for the rows that are left,
    because few responses get long.
    """

    @torch.inference_mode()
    def __init__(self, model: CausalModel, width: int, max_rows: int | None = None) -> None:
        trunk = model.base_model
        first = trunk.layers[0].self_attn
        self.model, self.trunk, self.width = model, trunk, width
        self.head_size, self.scale = first.head_dim, first.scaling
        self.num_kv_heads = first.k_proj.out_features // self.head_size
        self.num_heads = first.q_proj.out_features // self.head_size
        self.blocks = [_Block(block, self.num_heads + self.num_kv_heads) for block in trunk.layers]
        self.head = _FusedLinear([model.get_output_embeddings()])
        self.device, self.dtype = model.device, compute_dtype(model)
        per_row = (
            len(self.blocks) * 2 * self.num_kv_heads * self.head_size * width * self.dtype.itemsize
        )
        self.max_rows = max_rows or max(cache_bytes(self.device) // per_row, MIN_ROWS)
        shape = (0, 2 * self.num_kv_heads, 0, self.head_size)
        self.caches = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.blocks
        ]
        self.mask = torch.zeros(0, 1, 1, 0, dtype=self.dtype, device=self.device)
        """[slots, 1, 1, columns], added to attention scores: 0 for tokens, −∞ behind the last."""
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.max_length = 0
        self.rotation_table = self._rotation_table(torch.arange(width, device=self.device))

    def _rotation_table(self, positions: Int[Tensor, "n"]) -> Tensor:
        """Return the factors that rotate queries and keys at each position: [n, heads + 2 · kv
        heads, D/2], complex. Values have the factor 1, so that one product rotates the fused
        projection in place."""
        factors = rotations(self.trunk, positions).expand(
            -1, self.num_heads + self.num_kv_heads, -1
        )
        ones = factors.new_ones(len(positions), self.num_kv_heads, self.head_size // 2)
        return torch.cat([factors, ones], dim=1)

    def free_rows(self) -> int:
        return self.max_rows - len(self.lengths)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        before, added = len(self.lengths), len(prompts) * copies
        sizes = torch.tensor([len(p) for p in prompts], device=self.device)
        self._resize(before + added, max(self.max_length, int(sizes.max())))
        logits = []
        for start, stop in _spans_within([len(p) for p in prompts], PREFILL_TOKENS):
            packed = pack_rows(prompts[start:stop], self.device)
            slots = before + copies * torch.arange(start, stop, device=self.device)
            logits.append(self._prefill_packed(packed, slots))
        if copies > 1:
            self._copy_to_samples(before, len(prompts), copies, int(sizes.max()))
        self.lengths = torch.cat([self.lengths, sizes.repeat_interleave(copies)])
        self.max_length = max(self.max_length, int(sizes.max()))
        behind = (
            torch.arange(self.mask.shape[-1], device=self.device) >= self.lengths[before:, None]
        )
        self.mask[before : before + added, 0, 0] = torch.where(behind, -torch.inf, 0.0).to(
            self.dtype
        )
        return torch.cat(logits).repeat_interleave(copies, 0)

    def _prefill_packed(self, packed: Packed, slots: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Compute packed prompts, write their keys and values into their slots, and return the
        logits behind each prompt's last token."""
        slot = slots.repeat_interleave(torch.tensor(packed.lengths, device=self.device))
        factors = self.rotation_table[packed.positions]
        x = self.trunk.embed_tokens(packed.tokens)
        for number, (block, cache) in enumerate(zip(self.blocks, self.caches, strict=True)):
            heads = block.project_qkv(x, factors)
            cache[slot, :, packed.positions] = heads[:, self.num_heads :]
            queries, keys, values = heads.split(
                [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1
            )
            attended = repacked(
                causal_attention(queries, keys, values, packed, self.scale), packed
            ).flatten(1)
            # The last block's output is needed only behind the last token of each prompt.
            if number == len(self.blocks) - 1:
                x, attended = take(x, packed.output_index), take(attended, packed.output_index)
            x = block.residuals(x, attended)
        return self._logits(x)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        rows, until = torch.arange(len(tokens), device=self.device), self.max_length + 1
        self._resize(len(tokens), until)
        self.mask[rows, 0, 0, self.lengths] = 0.0
        mask = self.mask[: len(tokens), :, :, :until]
        factors = self.rotation_table[self.lengths]
        x = self.trunk.embed_tokens(tokens)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            heads = block.project_qkv(x, factors)
            cache[rows, :, self.lengths] = heads[:, self.num_heads :]
            # One new token per row: the query heads that share a key-value head take the place of
            # query positions, so that attention never repeats keys and values.
            queries = heads[:, : self.num_heads].unflatten(1, (self.num_kv_heads, -1))
            cached = cache[: len(tokens), :, :until]
            keys, values = cached[:, : self.num_kv_heads], cached[:, self.num_kv_heads :]
            attended = scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale
            )
            x = block.residuals(x, attended.flatten(1))
        self.lengths += 1
        self.max_length += 1
        return self._logits(x)

    @torch.inference_mode()
    def keep(self, unfinished: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        kept = unfinished.nonzero()[:, 0]
        order = torch.arange(len(kept), device=self.device)
        # After the move, slots 0 … len(kept) − 1 are in use. Rows below that stay where they are;
        # each finished row among them is a hole, and the kept rows above fill the holes in turn.
        holes, movers = (~unfinished[: len(kept)]).nonzero()[:, 0], kept[kept >= len(kept)]
        order[holes] = movers
        for cache in self.caches:
            cache[holes, :, : self.max_length] = cache[movers, :, : self.max_length]
        self.mask[holes] = self.mask[movers]
        self.lengths = self.lengths[order]
        self.max_length = int(self.lengths.max()) if len(order) else 0
        return order

    def _resize(self, rows: int, columns: int) -> None:
        """Make the caches at least this large. Where columns are added and half of the slots are
        unused, the unused slots are freed. New entries are 0 and not uninitialized: attention
        multiplies masked entries by 0, and 0 · NaN would be NaN."""
        num_slots, num_columns = self.mask.shape[0], self.mask.shape[-1]
        if rows <= num_slots and columns <= num_columns:
            return
        slots = num_slots
        if rows > num_slots:  # doubled, so that rows that join one by one do not copy each time
            slots = max(rows, min(2 * num_slots, self.max_rows))
        elif 2 * rows <= num_slots:
            slots = rows
        wide = num_columns
        if columns > num_columns:
            wide = min(-(-columns // BLOCK) * BLOCK, self.width)
        live, until = len(self.lengths), self.max_length

        for number, old in enumerate(self.caches):
            self.caches[number] = old.new_zeros(slots, 2 * self.num_kv_heads, wide, self.head_size)
            self.caches[number][:live, :, :until] = old[:live, :, :until]
        old, self.mask = self.mask, self.mask.new_full((slots, 1, 1, wide), -torch.inf)
        self.mask[:live, :, :, :until] = old[:live, :, :, :until]

    def _copy_to_samples(self, first: int, prompts: int, copies: int, until: int) -> None:
        """Copy each prompt's keys and values from its first sample's slot to its other samples'."""
        for cache in self.caches:
            slots = cache[first : first + prompts * copies, :, :until].unflatten(
                0, (prompts, copies)
            )
            slots[:, 1:] = slots[:, :1]

    def _logits(self, x: Float[Tensor, "B H"]) -> Float[Tensor, "B V"]:
        return self.head.in_float32(normed(self.trunk.norm, x))


class _Block:
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
        self.qkv = _FusedLinear(parts, [*paired, lambda x: x])
        self.out, self.gate_up, self.down = (
            _FusedLinear([attention.o_proj]),
            _FusedLinear([mlp.gate_proj, mlp.up_proj]),
            _FusedLinear([mlp.down_proj]),
        )
        self.activation = mlp.act_fn
        self.norms = block.input_layernorm, block.post_attention_layernorm
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
        x = self.out(attended).add_(x)
        gate, up = self.gate_up(normed(self.norms[1], x)).chunk(2, dim=-1)
        output: Tensor = self.down(gated(gate, up, self.activation))
        return output.add_(x)


class _FusedLinear:
    """x Wᵀ + b, W being the weights of one linear layer or of several, one below the other.

    On a CPU, oneDNN's kernels with W in their own layout are up to three times as fast for few rows
    as the kernels that torch chooses. For a W below `PACKED` numbers, calling them costs more than
    they save.
    """

    PACKED = 2**16

    def __init__(self, layers: Sequence[Any], reorder: Sequence[Any] = ()) -> None:
        """`reorder` has a function per layer that permutes the rows of its weight and bias."""
        reorder = reorder or [lambda x: x] * len(layers)
        weights = [f(merged_weight(layer)) for f, layer in zip(reorder, layers, strict=True)]
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

    def in_float32(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N M"]:
        """Return x Wᵀ + b in float32 at least, of bfloat16 numbers too."""
        return self(x) if self.packed else head_logits(x, self.weight, self.bias)


def _has_merged_weights(trunk: Any) -> bool:
    """Return whether each projection is a weight matrix, or one plus a LoRA that can be merged."""
    products = (
        product
        for block in trunk.layers
        for part in (block.self_attn, block.mlp)
        for name, product in part.named_children()
        if name.endswith("_proj")
    )
    return all(has_merged_weight(product) for product in products)


def cache_bytes(device: torch.device) -> int:
    """Return how many bytes keys and values may take: half a GiB of main memory, or half of what is
    free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**29


def _spans_within(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Split a sequence into spans (start, stop) of neighbours whose sizes add up to at most
    `limit`; a larger one is alone in its span."""
    spans, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            spans.append((start, i))
            start, total = i, 0
        total += size
    return [*spans, (start, len(sizes))]
