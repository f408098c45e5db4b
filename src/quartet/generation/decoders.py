"""What the generator needs of a model: to read prompts, to be given one more token per row, to
forget rows.

Two decoders do it. `PlainDecoder` is the model's own forward with transformers' cache: any
architecture. `LlamaDecoder` is the Llama family written out, on a cache of its own.
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
from quartet.models.packing import Packed, pack_rows, repacked, take
from quartet.models.padding import left_pad
from quartet.tensors import Bool, Float, Int, Tensor

BLOCK = 64
"""Tokens by which a cache grows."""

FEWEST_ROWS = 64
"""Rows that are written at once whatever their keys and values take: fewer would read the weights
more often than it pays."""

PREFILL_TOKENS = 4096
"""Prompt tokens that are read at once."""


@runtime_checkable
class Decoder(Protocol):
    """Rows of text that grow by a token at a time. Rows are numbered 0, 1, … in the order in which
    they came."""

    def room(self) -> int:
        """How many rows more could be taken in now."""
        ...

    def read(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        """Take in `copies` rows for each prompt, next to each other. Logits of the first token of
        each."""
        ...

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Append a token to every row. Logits of the next one."""
        ...

    def keep(self, going: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        """Forget the rows that are not going on; the old numbers of those that are, in their new
        order."""
        ...


def decoder(model: Any, width: int, max_rows: int | None = None) -> Decoder:
    """The fastest there is for this model, for texts of up to `width` tokens in at most so many
    rows at once."""
    if (
        has_fused_forward(model.base_model, width)
        and has_linear_head(model)
        and _plain_weights(model.base_model)
    ):
        return LlamaDecoder(model, width, max_rows)
    return PlainDecoder(model, max_rows)


class PlainDecoder:
    """Any causal language model of transformers, padded on the left so that its rows end together.
    New rows are taken in when the last old one has left."""

    def __init__(self, model: Any, max_rows: int | None = None) -> None:
        self.model, self.max_rows = model, max_rows or 512
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self.cache: Any = None

    def room(self) -> int:
        return 0 if len(self.mask) else self.max_rows

    def read(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
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

    def keep(self, going: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        stay = going.nonzero()[:, 0]
        if len(stay):
            self.cache.batch_select_indices(stay)
        self.mask = self.mask[stay]
        return stay

    def _forward(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B V"]:
        """Positions count real tokens, so that padding on the left shifts nothing."""
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
        return output.logits[:, -1]


class LlamaDecoder:
    """The Llama family on a cache of its own: a slot per row, no padding, rows come and go.

    The cache of a block is one tensor [slots, 2 · kv heads, columns, D], keys and values beside
    each other. The rows fill the first slots; when one leaves, the last takes its slot, so that
    nothing else is moved. Columns are added by the block, for the rows that are left: few answers
    get long.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, width: int, max_rows: int | None = None) -> None:
        trunk = model.base_model
        first = trunk.layers[0].self_attn
        self.model, self.trunk, self.width = model, trunk, width
        self.size, self.scale = first.head_dim, first.scaling
        self.num_kv = first.k_proj.out_features // self.size
        self.num_heads = first.q_proj.out_features // self.size
        self.blocks = [_Block(block, self.num_heads + self.num_kv) for block in trunk.layers]
        self.head = _Product([model.get_output_embeddings()])
        self.device, self.dtype = model.device, model.dtype
        per_row = len(self.blocks) * 2 * self.num_kv * self.size * width * self.dtype.itemsize
        self.max_rows = max_rows or max(cache_bytes(self.device) // per_row, FEWEST_ROWS)
        shape = (0, 2 * self.num_kv, 0, self.size)
        self.caches = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.blocks
        ]
        self.mask = torch.zeros(0, 1, 1, 0, dtype=self.dtype, device=self.device)
        """What each row sees of its slot: 0, and −∞ behind its end."""
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.longest = 0
        self.turns = self._turns(torch.arange(width, device=self.device))

    def _turns(self, positions: Int[Tensor, "n"]) -> Tensor:
        """The rotation of each position for every head of queries, keys and values: the last are
        multiplied by 1."""
        turn = rotations(self.trunk, positions).expand(-1, self.num_heads + self.num_kv, -1)
        return torch.cat([turn, turn.new_ones(len(positions), self.num_kv, self.size // 2)], dim=1)

    def room(self) -> int:
        return self.max_rows - len(self.lengths)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        before, added = len(self.lengths), len(prompts) * copies
        sizes = torch.tensor([len(p) for p in prompts], device=self.device)
        self._fit(before + added, max(self.longest, int(sizes.max())))
        logits = []
        for start, stop in _spans([len(p) for p in prompts], PREFILL_TOKENS):
            packed = pack_rows(prompts[start:stop], self.device)
            slots = before + copies * torch.arange(start, stop, device=self.device)
            logits.append(self._read(packed, slots))
        if copies > 1:
            self._copy(before, len(prompts), copies, int(sizes.max()))
        self.lengths = torch.cat([self.lengths, sizes.repeat_interleave(copies)])
        self.longest = max(self.longest, int(sizes.max()))
        behind = (
            torch.arange(self.mask.shape[-1], device=self.device) >= self.lengths[before:, None]
        )
        self.mask[before : before + added, 0, 0] = torch.where(behind, -torch.inf, 0.0).to(
            self.dtype
        )
        return torch.cat(logits).repeat_interleave(copies, 0)

    def _read(self, packed: Packed, slots: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """The prompts into their slots."""
        slot = slots.repeat_interleave(torch.tensor(packed.lengths, device=self.device))
        turns = self.turns[packed.positions]
        x = self.trunk.embed_tokens(packed.tokens)
        for number, (block, cache) in enumerate(zip(self.blocks, self.caches, strict=True)):
            heads = block.projected(x, turns)
            cache[slot, :, packed.positions] = heads[:, self.num_heads :]
            queries, keys, values = heads.split([self.num_heads, self.num_kv, self.num_kv], dim=1)
            read = repacked(
                causal_attention(queries, keys, values, packed, self.scale), packed
            ).flatten(1)
            if number == len(self.blocks) - 1:
                x, read = take(x, packed.output_index), take(read, packed.output_index)
            x = block.added(x, read)
        return self._logits(x)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        rows, until = torch.arange(len(tokens), device=self.device), self.longest + 1
        self._fit(len(tokens), until)
        self.mask[rows, 0, 0, self.lengths] = 0.0
        mask = self.mask[: len(tokens), :, :, :until]
        turns = self.turns[self.lengths]
        x = self.trunk.embed_tokens(tokens)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            heads = block.projected(x, turns)
            cache[rows, :, self.lengths] = heads[:, self.num_heads :]
            # Heads that share keys are queries of one head with the same mask.
            queries = heads[:, : self.num_heads].unflatten(1, (self.num_kv, -1))
            seen = cache[: len(tokens), :, :until]
            keys, values = seen[:, : self.num_kv], seen[:, self.num_kv :]
            read = scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale
            )
            x = block.added(x, read.flatten(1))
        self.lengths += 1
        self.longest += 1
        return self._logits(x)

    @torch.inference_mode()
    def keep(self, going: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        stay = going.nonzero()[:, 0]
        order = torch.arange(len(stay), device=self.device)
        holes, last = (~going[: len(stay)]).nonzero()[:, 0], stay[stay >= len(stay)]
        order[holes] = last
        for cache in self.caches:
            cache[holes, :, : self.longest] = cache[last, :, : self.longest]
        self.mask[holes] = self.mask[last]
        self.lengths = self.lengths[order]
        self.longest = int(self.lengths.max()) if len(order) else 0
        return order

    def _fit(self, rows: int, columns: int) -> None:
        """Make the caches large enough. What no row has written yet is 0: it is multiplied by 0 and
        must not be infinite."""
        have, wide = self.mask.shape[0], self.mask.shape[-1]
        if rows <= have and columns <= wide:
            return
        slots = (
            max(rows, min(2 * have, self.max_rows))
            if rows > have
            else rows
            if 2 * rows <= have
            else have
        )
        wide = min(-(-columns // BLOCK) * BLOCK, self.width) if columns > wide else wide
        live, until = len(self.lengths), self.longest

        for number, old in enumerate(self.caches):
            self.caches[number] = old.new_zeros(slots, 2 * self.num_kv, wide, self.size)
            self.caches[number][:live, :, :until] = old[:live, :, :until]
        old, self.mask = self.mask, self.mask.new_full((slots, 1, 1, wide), -torch.inf)
        self.mask[:live, :, :, :until] = old[:live, :, :, :until]

    def _copy(self, first: int, prompts: int, copies: int, until: int) -> None:
        """Each prompt's slot into those of its other samples."""
        for cache in self.caches:
            slots = cache[first : first + prompts * copies, :, :until].unflatten(
                0, (prompts, copies)
            )
            slots[:, 1:] = slots[:, :1]

    def _logits(self, x: Float[Tensor, "B H"]) -> Float[Tensor, "B V"]:
        return self.head(normed(self.trunk.norm, x))


class _Block:
    """One block's weights as the products that are taken: queries, keys and values in one, gate and
    up in one. The coordinates of queries and keys are ordered as the rotation wants them,
    neighbours in pairs."""

    def __init__(self, block: Any, turning: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.size, self.turning = attention.head_dim, turning
        paired = [
            lambda x: x.unflatten(0, (-1, 2, self.size // 2)).transpose(1, 2).flatten(0, 2)
        ] * 2
        self.qkv = _Product(parts, [*paired, lambda x: x])
        self.out, self.gate_up, self.down = (
            _Product([attention.o_proj]),
            _Product([mlp.gate_proj, mlp.up_proj]),
            _Product([mlp.down_proj]),
        )
        self.activation = mlp.act_fn
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [
                paired[0](norm.weight).expand(part.out_features // self.size, -1)
                for norm, part in zip((attention.q_norm, attention.k_norm), parts, strict=False)
            ]
            self.head_norm, self.head_eps = torch.cat(weights), attention.q_norm.variance_epsilon

    def projected(self, x: Float[Tensor, "N H"], turns: Tensor) -> Float[Tensor, "N heads D"]:
        """Queries, keys and values of every head, turned to their positions."""
        heads = self.qkv(normed(self.norms[0], x)).unflatten(-1, (-1, self.size))
        if self.head_norm is not None:
            turning = heads[:, : self.turning]
            turning.copy_(rms_norm(turning, (self.size,), None, self.head_eps) * self.head_norm)
        exact = heads.to(torch.promote_types(heads.dtype, torch.float32))
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turns)
        return exact.to(heads.dtype)

    def added(self, x: Float[Tensor, "N H"], read: Float[Tensor, "N A"]) -> Float[Tensor, "N H"]:
        """x with what attention read, and with what the perceptron makes of both."""
        x = self.out(read).add_(x)
        gate, up = self.gate_up(normed(self.norms[1], x)).chunk(2, dim=-1)
        return self.down(gated(gate, up, self.activation)).add_(x)


class _Product:
    """x Wᵀ + b for the rows of one W or of several one below the other. On a CPU, oneDNN's kernels
    with W laid out for them are up to three times as fast as what torch takes for few rows; for
    small W the call itself costs more than that."""

    PACKED = 2**16

    def __init__(self, parts: Sequence[Any], ordered: Sequence[Any] = ()) -> None:
        order = ordered or [lambda x: x] * len(parts)
        weights = [f(merged_weight(part)) for f, part in zip(order, parts, strict=True)]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = None
        if getattr(parts[0], "bias", None) is not None:
            self.bias = torch.cat(
                [
                    f(getattr(part, "base_layer", part).bias)
                    for f, part in zip(order, parts, strict=True)
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
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return linear(x, self.weight, self.bias)


def _plain_weights(trunk: Any) -> bool:
    """Whether every product's weights are one matrix each, or come to one."""
    products = (
        product
        for block in trunk.layers
        for part in (block.self_attn, block.mlp)
        for name, product in part.named_children()
        if name.endswith("_proj")
    )
    return all(has_merged_weight(product) for product in products)


def cache_bytes(device: torch.device) -> int:
    """What keys and values may take: half a GiB of a computer's memory, half of what is free on a
    GPU."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**29


def _spans(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Neighbours whose sizes add up to at most `limit` (or one alone), as start and stop."""
    spans, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            spans.append((start, i))
            start, total = i, 0
        total += size
    return [*spans, (start, len(sizes))]
