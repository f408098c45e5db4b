"""The support of a policy: the token ids that it can give.

The embeddings of many models have more rows than their tokenizer has tokens (Qwen, Gemma and Phi
round the number up). A row behind the last token means nothing, and was never trained. A policy is
therefore the softmax over the ids of tokens alone: nothing else is sampled, and the learner's
log-probs, entropies and KLs are of the same distribution.
"""

from typing import Any

from quartet.models.adapters import AdapterView, LanguageModel
from quartet.models.protocols import CausalModel, Tokenizer

ATTRIBUTE = "quartet_support"
"""Where a model keeps its support, so that copies have it too."""


def limit_support(model: Any, tokenizer: Tokenizer) -> Any:
    """Limit the support of a language model to the ids of a tokenizer, and return the model."""
    size = 1 + max(tokenizer.get_vocab().values())
    if size < model.config.get_text_config().vocab_size:
        setattr(model, ATTRIBUTE, size)
    return model


def support_of(model: LanguageModel) -> int | None:
    """Return the number of ids that a policy can give, the first ones; None: all rows of its
    embeddings."""
    whole = model.model if isinstance(model, AdapterView) else model
    size: int | None = getattr(whole, ATTRIBUTE, None)
    return size


def ids_outside(model: CausalModel) -> range:
    """Return the rows of the embeddings that are outside of the support."""
    rows = model.config.get_text_config().vocab_size
    size = support_of(model)
    return range(rows if size is None else size, rows)
