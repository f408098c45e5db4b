"""What a trunk, a model without its head, has understood at the positions somebody asks about."""

from typing import Any

from quartet.models.llama import hidden_states, written_out
from quartet.models.packing import pack
from quartet.tensors import Bool, Float, Int, Tensor


def read(trunk: Any, tokens: Int[Tensor, "B T"], asked: Bool[Tensor, "B T"]) -> Float[Tensor, "N H"]:
    """The last hidden states there, row by row, from right-padded rows. No real token can see padding, and its position is its
    index: transformers' own forward needs neither an attention mask nor position ids."""
    packed = pack(tokens, asked)
    if written_out(trunk, packed.width):
        return hidden_states(trunk, packed)
    within = slice(None, packed.width)
    return trunk(input_ids=tokens[:, within], use_cache=False).last_hidden_state[asked[:, within]]
