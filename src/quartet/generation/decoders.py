"""Decoders: a language model with a key-value cache, as the native generator uses it.

A decoder takes prompts in (`prefill`), appends one token to every row (`step`) and drops finished
rows (`keep`). `PlainDecoder` (`generation/plain.py`) calls the model's own forward and works for
any architecture. `RowDecoder` computes the architectures of `models/architectures.py` itself, on a
cache that it owns: rows need no padding, and new rows can join while others are being decoded.
`SlotDecoder` does so with the shapes and kernels that suit a GPU.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch.nn.functional import scaled_dot_product_attention

from quartet.generation.cache import PREFILL_TOKENS, spans_within
from quartet.generation.fused import FusedDecoder, has_products
from quartet.generation.plain import PlainDecoder, check_states
from quartet.generation.slots import SlotDecoder
from quartet.models.attention import backend, capped_attention
from quartet.models.forward import has_linear_head
from quartet.models.fused import has_fused_forward, layers_of
from quartet.models.packing import pack_rows
from quartet.models.precision import compute_dtype
from quartet.models.protocols import CausalModel
from quartet.tensors import Bool, Float, Int, Tensor

BLOCK = 64
"""A cache is lengthened by a multiple of this many columns (tokens)."""


@runtime_checkable
class Decoder(Protocol):
    """A batch of texts, the rows, each of which grows by one token per step. Rows are numbered
    0, 1, … in the order in which they were added."""

    look_every: int
    """After how many tokens the caller checks which rows have ended. Each check makes the host wait
    for the device. Until the check, a row that has ended gets further tokens, which are dropped."""

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
    `max_rows` rows are decoded together, by default as many as memory holds. Raises ModelError for
    a recurrent model whose states padding would change."""
    if (
        has_fused_forward(model.base_model, width)
        and has_linear_head(model)
        and has_products(model.base_model)
    ):
        size = layers_of(model.base_model)[0].head_size
        if backend(model.device, compute_dtype(model), size) == "varlen":
            return SlotDecoder(model, width, max_rows)
        return RowDecoder(model, width, max_rows)
    check_states(model)
    return PlainDecoder(model, max_rows)


class RowDecoder(FusedDecoder):
    """Decodes on a cache with one slot per row, without padding.

    Each block's cache is one tensor [slots, 2 · kv heads, columns, D], the keys before the values.
    Row i is in slot i. When a row leaves, the last row moves into its slot, so at most one slot is
    copied per row that leaves. Columns are added `BLOCK` at a time for the rows that are left,
    because few responses get long.
    """

    look_every = 1

    @torch.inference_mode()
    def __init__(self, model: CausalModel, width: int, max_rows: int | None = None) -> None:
        super().__init__(model, width, max_rows)
        shape = (0, 2 * self.kv_heads, 0, self.head_size)
        self.caches = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.blocks
        ]
        self.mask = torch.zeros(0, 1, 1, 0, dtype=self.dtype, device=self.device)
        """[slots, 1, 1, columns], added to attention scores: 0 for tokens, −∞ behind the last."""
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.max_length = 0

    def free_rows(self) -> int:
        return self.max_rows - len(self.lengths)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        before, added = len(self.lengths), len(prompts) * copies
        sizes = torch.tensor([len(p) for p in prompts], device=self.device)
        self._resize(before + added, max(self.max_length, int(sizes.max())))
        logits = []
        for start, stop in spans_within([len(p) for p in prompts], PREFILL_TOKENS):
            packed = pack_rows(prompts[start:stop], self.device)
            slots = before + copies * torch.arange(start, stop, device=self.device)
            lengths = torch.tensor(packed.lengths, device=self.device)
            logits.append(self._prefill_packed(packed, slots.repeat_interleave(lengths)))
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

    def _store(
        self,
        cache: Tensor,
        slots: Int[Tensor, "N"],
        places: Int[Tensor, "N"],
        keys_and_values: Float[Tensor, "N kv2 D"],
    ) -> None:
        cache[slots, :, places] = keys_and_values

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        rows, until = torch.arange(len(tokens), device=self.device), self.max_length + 1
        self._resize(len(tokens), until)
        self.mask[rows, 0, 0, self.lengths] = 0.0
        masks = self._masks(len(tokens), until)
        factors, x = self._factors_at(self.lengths), self.embedding(tokens, self.lengths)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            layer = block.layer
            heads = block.project_qkv(x, factors[layer.rotation])
            self._store(cache, rows, self.lengths, heads[:, self.heads :])
            cached = cache[: len(tokens), :, :until]
            keys, values = cached[:, : self.kv_heads], cached[:, self.kv_heads :]
            queries, mask = heads[:, : self.heads], masks[layer.window]
            if layer.cap is None:
                # One new token per row: the query heads that share a key-value head take the place
                # of query positions, so that attention never repeats keys and values.
                attended = scaled_dot_product_attention(
                    queries.unflatten(1, (self.kv_heads, -1)),
                    keys,
                    values,
                    attn_mask=mask,
                    scale=layer.scale,
                )
            else:
                attended = capped_attention(
                    queries[:, :, None], keys, values, mask[:, None] == 0, layer.scale, layer.cap
                )
            x = block.residuals(x, attended.flatten(1))
        self.lengths += 1
        self.max_length += 1
        return self._logits(x)

    def _masks(self, rows: int, until: int) -> dict[int | None, Tensor]:
        """Return what is added to attention scores for each width of a window."""
        mask = self.mask[:rows, :, :, :until]
        masks: dict[int | None, Tensor] = {None: mask}
        for window in {block.layer.window for block in self.blocks}:
            masks[window] = mask
            if window is not None and until > window:
                places = torch.arange(until, device=self.device)
                before = places <= self.lengths[:, None, None, None] - window
                masks[window] = mask.masked_fill(before, -torch.inf)
        return masks

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
            self.caches[number] = old.new_zeros(slots, 2 * self.kv_heads, wide, self.head_size)
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
