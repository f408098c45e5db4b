"""Sequence classifiers with a tokenizer of their own: how they read a text, and how they score it.

A reward model on another backbone than the policy's reads the text of prompt and response, encoded
again by its own tokenizer. It may be a decoder, read at the last token, or an encoder (BERT,
RoBERTa, ModernBERT, …), which sees the whole text at once and pools it as its class does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from quartet.experience import Prompt
from quartet.models.actor_critic import pad_token_id
from quartet.models.chat import conversation_ids
from quartet.models.classifiers import define_classifier, load_classifier
from quartet.models.heads import ScalarModel, initialise, scores_last_token
from quartet.models.language_model import (
    OWN_CODE,
    UNLOADABLE,
    ModelError,
    check_finite,
    first_line,
    load_tokenizer,
    longest_of,
    read_config,
)
from quartet.models.logprobs import at_least_float32
from quartet.models.precision import label_layer
from quartet.models.protocols import Tokenizer
from quartet.models.trunk import checkpointing
from quartet.tensors import Bool, Float, Int, Tensor


class PooledScalar(ScalarModel):
    """A sequence classifier that pools the whole text, as encoders do. It has one number for each
    text, which stands at the text's last token."""

    def __init__(self, model: Any, tokenizer: Tokenizer, label: int = 0) -> None:
        """`label` is the index of the label that is the score."""
        nn.Module.__init__(self)
        self.model, self.label = model.eval(), label
        self.head = label_layer(model)
        self.separator = segment_separator(tokenizer)

    def forward(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N"]:
        """Return the score of each row less the centre. The mask marks the last token of each
        right-padded row, and nothing else."""
        tokens = tokens.to(self.model.device)
        lengths = output_mask.int().argmax(dim=1).to(tokens.device) + 1
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        segments = {}
        if self.separator is not None:
            separators = (tokens == self.separator).long()
            in_second = (separators.cumsum(dim=1) - separators > 0) & mask
            segments["token_type_ids"] = in_second.long()
        with checkpointing(self.model):
            logits = self.model(input_ids=tokens, attention_mask=mask.long(), **segments).logits
        scores: Tensor = at_least_float32(logits[:, self.label]) - self.centre
        return scores


class LabelScalar(ScalarModel):
    """A decoder with several labels, one of which is the score."""

    def __init__(self, model: Any, label: int) -> None:
        nn.Module.__init__(self)
        self.model, self.head, self.label = model.eval(), model.score, label

    def forward(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N"]:
        tokens, output_mask = tokens.to(self.model.device), output_mask.to(self.model.device)
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        scores: Tensor = at_least_float32(self.head(hidden[output_mask])[:, self.label])
        return scores - self.centre


def segment_separator(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends the first text of a pair, where the tokenizer gives the second
    text a token type of its own, as BERT's does; None where all tokens have type 0.

    Raises ModelError where the types are others.
    """
    pair = tokenizer("a", "b")
    types: Any = pair.get("token_type_ids")
    end: Any = getattr(tokenizer, "sep_token_id", None)
    if types is None or not any(types):
        return None
    second = pair.input_ids.index(end) + 1 if end in pair.input_ids else 0
    if types != [0] * second + [1] * (len(types) - second):
        raise ModelError(
            f"a reward model's tokenizer marks prompt and response by the token types {types}, "
            "which Quartet cannot read. Use an encoder such as BERT or RoBERTa, or a decoder."
        )
    return int(end)


def scalar_of(model: Any, tokenizer: Tokenizer, label: int = 0) -> ScalarModel:
    """Return a sequence classifier as a scalar model; `label` is the index of its score."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return PooledScalar(model, tokenizer, label)
    return ScalarModel(model) if model.config.num_labels == 1 else LabelScalar(model, label)


def load_scorer(folder: str | Path, device: torch.device | None) -> ScalarModel:
    """Return the reward model of a Hugging Face folder or hub id, of any architecture."""
    if scores_last_token(read_config(folder)):
        return ScalarModel.load(folder, device)
    model = load_classifier(AutoModelForSequenceClassification, folder, device)
    return scalar_of(model, load_tokenizer(folder, generates=False))


def new_scorer(
    folder: str | Path, tokenizer: Tokenizer, device: torch.device, seed: int
) -> ScalarModel:
    """Return a reward model to be trained from a folder or hub id: a language model or an encoder
    under a new head, or a reward model that was trained before, with its head.

    A new head is initialised as `ScalarModel.from_trunk` does for a decoder, and by the
    architecture's own rule for an encoder. Raises ModelError.
    """
    config = read_config(folder)
    check_backbone(folder, config)
    define_classifier(config)
    names = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **names,
                **OWN_CODE,
            )
    except UNLOADABLE as error:
        raise ModelError(
            f"reward_model.model: {folder} cannot be loaded ({first_line(error)})."
        ) from error
    trunk = f"{model.base_model_prefix}."
    missing = [n for n in report["missing_keys"] if n.startswith(trunk) and ".pooler." not in n]
    if missing:
        raise ModelError(
            f"reward_model.model: {folder} has no weights for {min(missing)}, which would be "
            "random. Is its config.json its own?"
        )
    check_finite(folder, model)
    scalar = scalar_of(model.to(device), tokenizer)
    if scores_last_token(config):
        model.config.pad_token_id = pad_token_id(tokenizer)
        if "score.weight" in report["missing_keys"]:
            initialise(scalar.head, seed)
    return scalar


def check_backbone(folder: str | Path, config: Any) -> None:
    """Raise ModelError unless a reward model can be trained from the model of this config."""
    kind = (config.architectures or [""])[0]
    if config.is_encoder_decoder:
        raise ModelError(
            f"reward_model.model: {folder} is an encoder with a decoder ({config.model_type}), "
            "which is no reward model. Use an encoder such as BERT, or a decoder."
        )
    if kind.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise ModelError(
            f"reward_model.model: {folder} is a classifier with {config.num_labels} labels, and a "
            "reward model has 1. Name the model that it was trained from."
        )


def reads_tokens_of(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Return whether a reward model can read the ids of another model's tokenizer as they are: it
    is a decoder, and its own tokenizer has the same ids."""
    return has_same_ids(folder, tokenizer) and scores_last_token(read_config(folder))


def has_same_ids(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer of a folder or hub id gives another's tokens the ids that they
    have there, padding aside, which no model reads. It may have more tokens. Raises ModelError
    where there is no tokenizer."""
    own, padding = load_tokenizer(folder, generates=False).get_vocab(), tokenizer.pad_token_id
    if padding == tokenizer.eos_token_id:  # a token that is read, too
        padding = None
    vocabulary = tokenizer.get_vocab().items()
    return all(own.get(token) == number for token, number in vocabulary if number != padding)


@dataclass(frozen=True)
class TextReader:
    """How a sequence classifier reads a prompt and a response: by its own tokenizer.

    Conversations go through its own chat template. Plain text is joined for a decoder, with an end
    of sequence where the response ended, and is given as a pair to an encoder.
    """

    tokenizer: Tokenizer
    is_decoder: bool
    limit: int
    """The most tokens that the model reads."""

    @classmethod
    def of(cls, folder: str | Path) -> "TextReader":
        """Return the reader of a Hugging Face folder or hub id."""
        tokenizer, config = load_tokenizer(folder, generates=False), read_config(folder)
        is_decoder, limit = scores_last_token(config), longest_of(config)
        if not is_decoder:  # RoBERTa has two more positions than tokens that it can read
            limit = min(limit, int(getattr(tokenizer, "model_max_length", limit)))
        return cls(tokenizer, is_decoder, limit)

    def ids(self, prompt: Prompt, response: str, ended: bool) -> list[int]:
        """Return the token ids of a prompt and a response; `ended` says whether the response has
        an end. What the texts quote of the tokenizer's control tokens is text."""
        if prompt.messages is not None and self.tokenizer.chat_template is not None:
            reply: Mapping[str, Any] = {"role": "assistant", "content": response}
            return conversation_ids(self.tokenizer, [*prompt.messages, reply], prompt.extra)
        encode = partial(self.tokenizer, split_special_tokens=True)
        if not self.is_decoder:
            return list(encode(prompt.text, response).input_ids)
        ids, end = list(encode(prompt.text + response).input_ids), self.tokenizer.eos_token_id
        return [*ids, end] if ended and end is not None and ids[-1:] != [end] else ids

    def too_long(self, ids: Sequence[int]) -> bool:
        """Return whether the model cannot read so many tokens."""
        return len(ids) > self.limit
