"""The small tokenizers of the embedded worlds."""

from collections.abc import Iterable
from typing import Any

SPECIAL = ("<pad>", "<eos>", "<unk>")


def _fast(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def word_tokenizer(words: Iterable[str], punctuation: str) -> Any:
    """Return a tokenizer with one token per word and punctuation mark. A word's token includes the
    space before it, so that decoding restores the text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIAL, *punctuation, *sorted({"▁" + word for word in words})]
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.Metaspace()
    return _fast(backend)


def character_tokenizer(alphabet: str) -> Any:
    """Return a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIAL, *alphabet]
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return _fast(backend)
