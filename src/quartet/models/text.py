"""Token ids of text.

A text that quotes a control token, such as `<|im_end|>`, is text: `text_ids` never returns the id
of a control token. Only a chat template writes them (`quartet.models.chat`), and the end of a
response is appended as an id.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from quartet.models.protocols import Tokenizer

WORD_MARKS = ("▁", "Ġ")
"""How tokenizers write the space before a word."""
ANCHORS = ("\n", "a", ":", ".")
"""Texts that stand before a text while it is encoded as the continuation of another. Most
tokenizers with a dummy prefix have no token that contains the first and something else."""


def text_ids(tokenizer: Tokenizer, text: str, continues: bool = False) -> list[int]:
    """Return the token ids of a text in which nothing is a control token.

    `continues`: the text follows another one, as a response follows its prompt. The ids are then
    those that the text has inside a running text: tokenizers such as Llama 2's put a space before
    the first word of what they are given, and here it is left out.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    return continued(tokenizer, text, encode) if continues else encode(text)


def continued(tokenizer: Tokenizer, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return what `encode` gives for a text that follows another one, without the space that some
    tokenizers put before the first word."""
    traits = _traits(tokenizer)
    unknown: Any = getattr(tokenizer, "unk_token_id", None)
    for anchor, before in traits.anchors if text else ():
        whole = encode(anchor + text)
        ids = whole[len(before) :]
        if not ids or whole[: len(before)] != before:
            continue
        if unknown not in ids or ids.count(unknown) <= encode(text).count(unknown):
            return ids
    return encode(text)


def response_ids(tokenizer: Tokenizer, text: str, end: int | None) -> list[int]:
    """Return the ids of a response in plain text, and the token that ended it; `end` is None for a
    response that was cut off."""
    ids = text_ids(tokenizer, text, continues=True)
    return ids if end is None else [*ids, end]


def decoded_response(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    prompt: str | None = None,
) -> str:
    """Return the text of a response as it reads after its prompt, without control tokens: some
    tokenizers decode a first word differently when nothing is before it. `prompt` is the prompt
    decoded, where that is known."""
    if prompt is None:
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole: str = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    response: str = tokenizer.decode(ids, skip_special_tokens=True)
    return response


def control_pattern(tokenizer: Tokenizer) -> "re.Pattern[str] | None":
    """Return a pattern that matches the control tokens of a tokenizer as it writes them in text,
    the longest first; None if it has none. The token is its first group."""
    return _traits(tokenizer).control


def quoted_control(tokenizer: Tokenizer, text: str) -> str | None:
    """Return the first control token that a text quotes, None if it quotes none."""
    pattern = control_pattern(tokenizer)
    match = None if pattern is None else pattern.search(text)
    return None if match is None else match[1]


@dataclass(frozen=True)
class _Traits:
    """What is looked up once for each tokenizer."""

    size: int
    """The number of tokens when it was looked up: tokens can be added."""
    control: "re.Pattern[str] | None"
    anchors: tuple[tuple[str, list[int]], ...]
    """Where the tokenizer puts a space before the first word of every text: texts that can stand
    before another one instead, with their ids."""


_TRAITS: "WeakKeyDictionary[Tokenizer, _Traits]" = WeakKeyDictionary()


def _traits(tokenizer: Tokenizer) -> _Traits:
    traits = _TRAITS.get(tokenizer)
    if traits is None or not _has_size(tokenizer, traits.size):
        tokens = {str(token) for token in tokenizer.all_special_tokens}
        tokens |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted((t for t in tokens if len(t) > 1), key=lambda t: (-len(t), t))
        either = "|".join(map(re.escape, longest_first))
        control = re.compile(f"({either})") if either else None
        _TRAITS[tokenizer] = traits = _Traits(len(tokenizer), control, _anchors(tokenizer))
    return traits


def _has_size(tokenizer: Tokenizer, size: int) -> bool:
    """Return whether the tokenizer still has so many tokens. Each added token gets the next id, so
    it does where no token has the id `size`. `len` counts all of them, which takes 3 ms of a
    vocabulary of 262,144: 18 times as long as a sentence takes to encode."""
    if getattr(tokenizer, "is_fast", False) and tokenizer.convert_ids_to_tokens([size]) == [None]:
        return True
    return len(tokenizer) == size


def _anchors(tokenizer: Tokenizer) -> tuple[tuple[str, list[int]], ...]:
    """Return the anchors that the tokenizer knows, with their ids, if it puts a space before the
    first word of every text. An unknown token is no anchor: it may stand for the anchor and the
    first word together."""
    written = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    if not written or not written[0].startswith(WORD_MARKS):
        return ()
    unknown: Any = getattr(tokenizer, "unk_token_id", None)
    encoded = ((anchor, tokenizer.encode(anchor, add_special_tokens=False)) for anchor in ANCHORS)
    return tuple((anchor, ids) for anchor, ids in encoded if ids and unknown not in ids)
