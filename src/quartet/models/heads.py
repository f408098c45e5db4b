"""Scalar heads: one number per sequence (a reward model) or per token (a critic).

Both are a causal trunk with a linear layer to one number. The reward model reads it at the last real token, the critic at
every token; so a critic can start as a copy of the reward model, and both are saved as Hugging Face folders that
`AutoModelForSequenceClassification` loads.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from quartet.models.language_model import ModelError, first_line
from quartet.models.logprobs import speaking, under_own_token
from quartet.models.trunk import read
from quartet.tensors import Bool, Float, Int, Tensor

CENTRE = "quartet_reward_centre"
"""The key of config.json under which a reward model keeps the mean that is taken off its scores."""


def load_classifier(auto: Any, folder: str | Path, device: torch.device | None) -> Any:
    """A sequence or token classifier of a Hugging Face folder or hub id, by its Auto class. A folder without the head would be
    given a random one: it is refused."""
    try:
        model, report = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded as a reward model ({first_line(error)}).") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: has no weights for {missing[0]}, so it is no trained model for "
            f"{auto.__name__.removeprefix('AutoModelFor')}."
        )
    return model.to(device).eval()


class ScalarModel(nn.Module):
    """A Hugging Face sequence classifier with one label, read as a reward model or as a critic."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.config.num_labels != 1:
            raise ModelError(
                f"{model.config.name_or_path or 'the model'} has {model.config.num_labels} labels; a reward model needs 1."
            )
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ModelError(f"{type(model).__name__}: is not read at a last token by a head called score, as decoders are.")
        self.model = model.eval()

    @classmethod
    def from_trunk(cls, language_model: Any, pad_token_id: int | None, seed: int) -> "ScalarModel":
        """The trunk of a language model (its weights are copied) under a new head with weights N(0, 1/√(d + 1)), the
        initialisation of Stiennon et al. 2020."""
        labels = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
        config = AutoConfig.for_model(**{**language_model.config.to_dict(), **labels, "pad_token_id": pad_token_id})
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise ModelError(
                f"transformers has no sequence classifier for the architecture {config.model_type}, so it cannot be a "
                'reward model or a critic of its own. Use critic = { type = "shared" } and a reward that is no model.'
            ) from error
        model.base_model.load_state_dict(language_model.base_model.state_dict())
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.normal_(0, 1 / math.sqrt(model.score.in_features + 1), generator=noise)
        return cls(model.to(next(language_model.parameters()).device))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None) -> "ScalarModel":
        """A Hugging Face folder with a sequence classifier of one label."""
        return cls(load_classifier(AutoModelForSequenceClassification, folder, device))

    def save(self, folder: Path, tokenizer: Any) -> None:
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    @property
    def centre(self) -> float:
        return float(getattr(self.model.config, CENTRE, 0.0))

    @centre.setter
    def centre(self, mean: float) -> None:
        setattr(self.model.config, CENTRE, mean)

    def forward(self, tokens: Int[Tensor, "B T"], asked: Bool[Tensor, "B T"]) -> Float[Tensor, "N"]:
        """The head, centred, at the positions of right-padded rows that are asked for: what the model thinks once it has read
        that token."""
        return self.model.score(read(self.model.base_model, tokens, asked)).squeeze(-1).float() - self.centre

    def scores(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """One number per row: the head at the last real token."""
        return self(tokens, torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1)

    def values(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """One number per masked token, the value before it was chosen: the head at the position before. 0 elsewhere."""
        return under_own_token(self(tokens, speaking(mask)), mask)


class ValueHead(nn.Module):
    """A linear layer to one number on hidden states that somebody else computed; it starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N"]:
        return self.linear(hidden).squeeze(-1).float()
