"""The decoder for any architecture: the model's own forward, with transformers' cache."""

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from quartet.generation.cache import PLAIN_ROWS
from quartet.models.language_model import ModelError
from quartet.models.padding import left_pad
from quartet.models.protocols import CausalModel
from quartet.models.recurrent import is_recurrent, why_not_sampled
from quartet.tensors import Bool, Float, Int, Tensor

DIFFERENCE = 0.05
"""How far apart, relative to their length, the logits of a recurrent model may be by themselves and
among padded rows: its state is summed in another order. A state that padding had changed would be
off by more."""
_IS_EXACT: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


class PlainDecoder:
    """Decodes with the forward pass of any causal language model of transformers. Prompts are
    padded on the left, so that all rows end in the same column. Its cache has one length, so new
    rows can be added only when no old row is left."""

    look_every = 1

    def __init__(self, model: CausalModel, max_rows: int | None = None) -> None:
        """Raises ModelError for a recurrent model that is not known."""
        if (why := why_not_sampled(model.config)) is not None:
            raise ModelError(f"{why}.")
        self.model, self.max_rows = model, max_rows or PLAIN_ROWS
        takes = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.attends = "past_key_values" in takes
        """Whether the model has attention at all; Mamba has none, and calls its cache otherwise."""
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self.cache: Any = None

    def free_rows(self) -> int:
        return 0 if len(self.mask) else self.max_rows

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        self.cache = DynamicCache(config=self.model.config)
        ids, self.mask = left_pad(prompts, self.model.device)
        logits = self._forward(ids)
        if copies > 1:
            self._take(torch.arange(len(ids), device=ids.device).repeat_interleave(copies))
        return logits.repeat_interleave(copies, 0)

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        self.mask = pad(self.mask, (0, 1), value=True)
        return self._forward(tokens[:, None])

    def keep(self, unfinished: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        kept = unfinished.nonzero()[:, 0]
        if len(kept):
            self._take(kept)
        else:
            self.mask = self.mask[kept]
        return kept

    def _take(self, rows: Int[Tensor, "n"]) -> None:
        """Make row i what row `rows[i]` was, in the keys, the values and the recurrent states."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def _forward(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B V"]:
        """Return the logits behind each row's last token."""
        width = ids.shape[1]
        # Positions count real tokens: padding on the left must not shift a text. The clamp is for
        # the padding itself, whose outputs nothing reads.
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        extra = {"position_ids": positions} if self.takes_positions else {}
        extra["past_key_values" if self.attends else "cache_params"] = self.cache
        # Without attention nothing looks back at padding, and the mask is of the new tokens alone.
        mask = self.mask if self.attends else self.mask[:, -width:]
        output = self.model(
            input_ids=ids, attention_mask=mask.long(), use_cache=True, logits_to_keep=1, **extra
        )
        logits: Tensor = output.logits
        return logits[:, -1]


@torch.no_grad()
def check_states(model: CausalModel) -> None:
    """Raise ModelError for a recurrent model unless rows of two lengths, decoded together, have the
    logits that each has alone. Done once per model."""
    if not is_recurrent(model.config):
        return
    if model not in _IS_EXACT:
        decoder, device = PlainDecoder(model), model.device
        size = model.get_input_embeddings().weight.shape[0]
        texts = [[token % size for token in text] for text in ([3, 7, 5, 9, 4, 8], [6, 2])]
        decoder.prefill([text[:-1] for text in texts], 2)
        decoder.keep(torch.tensor([True, False, False, True], device=device))
        together = decoder.step(torch.tensor([text[-1] for text in texts], device=device))
        alone = torch.stack(
            [model(input_ids=torch.tensor([t], device=device)).logits[0, -1] for t in texts]
        )
        errors, sizes = (together - alone).norm(dim=-1), alone.norm(dim=-1)
        _IS_EXACT[model] = bool((errors <= DIFFERENCE * sizes).all())
    if not _IS_EXACT[model]:
        kind = model.config.model_type
        raise ModelError(
            f"{kind} keeps a recurrent state, which padding changes in this version of "
            "transformers: texts decoded together get other logits than alone. Quartet cannot "
            "sample from it."
        )
