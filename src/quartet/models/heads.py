"""Scalar heads: one number per sequence (a reward model) or per token (a critic).

Both are a causal trunk with a linear layer to one number. The reward model reads it at the last
real token, the critic at every token; so a critic can start as a copy of the reward model. They are
saved as Hugging Face folders that `AutoModelForSequenceClassification` and
`AutoModelForTokenClassification` load. On a trunk that is a policy's, each is an adapter and a
head.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.models.adapters import (
    AdapterView,
    adapter_parameters,
    load_adapter,
    merged_state,
    save_adapter,
)
from quartet.models.language_model import (
    OWN_CODE,
    UNLOADABLE,
    ModelError,
    check_finite,
    first_line,
    read_config,
)
from quartet.models.logprobs import at_least_float32, predicting_positions, scatter_to_tokens
from quartet.models.trunk import hidden_states
from quartet.tensors import Bool, Float, Int, Tensor

CENTRE = "quartet_reward_centre"
"""The key of config.json under which a reward model keeps the mean that is taken off its scores."""


def load_classifier(auto: Any, folder: str | Path, device: torch.device | None) -> Any:
    """A sequence or token classifier of a Hugging Face folder or hub id, by its Auto class. A
    folder without the head would be given a random one: it is refused."""
    try:
        model, report = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **OWN_CODE
        )
    except UNLOADABLE as error:
        raise ModelError(
            f"{folder}: cannot be loaded as a reward model ({first_line(error)})."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: has no weights for {missing[0]}, so it is no trained model for "
            f"{auto.__name__.removeprefix('AutoModelFor')}."
        )
    check_finite(folder, model)
    return model.to(device).eval()


class ScalarModel(nn.Module):
    """A Hugging Face sequence or token classifier with one label, read as a reward model or as a
    critic."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.config.num_labels != 1:
            raise ModelError(
                f"{model.config.name_or_path or 'the model'} has {model.config.num_labels} labels; "
                f"a reward model needs 1."
            )
        self.model = model.eval()
        self.head = head_of(model)

    @classmethod
    def from_trunk(
        cls,
        language_model: Any,
        pad_token_id: int | None,
        seed: int,
        share_frozen: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> "ScalarModel":
        """The trunk of a language model under a new head with weights N(0, 1/√(d + 1)), the
        initialisation of Stiennon et al. 2020. Its weights are copied, with the adapter that works
        now; with `share_frozen`, those that are not trained are the language model's own.
        `tensors`: the trunk's, where it is in parts."""
        config = AutoConfig.for_model(
            **_one_label(language_model.config, "reward") | {"pad_token_id": pad_token_id}
        )
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise ModelError(
                f"transformers has no sequence classifier for the architecture "
                f"{config.model_type}, so it cannot be a "
                'reward model or a critic of its own. Use critic = { type = "shared" } and a '
                "reward that is no model."
            ) from error
        model.base_model.load_state_dict(merged_state(language_model.base_model, tensors))
        if share_frozen:
            take_frozen(language_model.base_model, model.base_model)
        made = cls(model.to(next(language_model.parameters()).device))
        initialise(made.head, seed)
        return made

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None) -> "ScalarModel":
        """A Hugging Face folder with a sequence or token classifier of one label."""
        kinds = read_config(folder).architectures or [""]
        per_token = kinds[0].endswith("ForTokenClassification")
        auto = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
        return cls(load_classifier(auto, folder, device))

    def save(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """A sequence classifier: what a reward model is elsewhere. Every rank of the team calls it,
        one writes."""
        state = full_state_dict(self.model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return
        self.model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    def save_per_token(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """A token classifier: what a critic is elsewhere. Its number at a token is the value once
        that token was read; the centre is in the head's bias. Architectures without one are saved
        as `save` does."""
        config = AutoConfig.for_model(**_one_label(self.model.config, "value"))
        setattr(config, CENTRE, 0.0)
        try:
            with torch.device("meta"):
                made = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
        except ValueError:
            return self.save(folder, tokenizer, process_group)
        trunk = full_state_dict(self.model.base_model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return None
        made.base_model.load_state_dict(trunk, assign=True)
        head = head_of(made).to_empty(device=self.head.weight.device)
        with torch.no_grad():
            head.weight.copy_(self.head.weight)
            bias = 0.0 if self.head.bias is None else self.head.bias
            head.bias.copy_(torch.zeros_like(head.bias) + bias - self.centre)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return None

    @property
    def centre(self) -> float:
        return float(getattr(self.model.config, CENTRE, 0.0))

    @centre.setter
    def centre(self, mean: float) -> None:
        setattr(self.model.config, CENTRE, mean)

    def hidden(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N H"]:
        return hidden_states(self.model.base_model, tokens, output_mask)

    def forward(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N"]:
        """The head, centred, at the positions of right-padded rows that are asked for: what the
        model thinks once it has read that token."""
        return (
            at_least_float32(self.head(self.hidden(tokens, output_mask)).squeeze(-1)) - self.centre
        )

    def scores(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """One number per row: the head at the last real token."""
        return self(
            tokens, torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1
        )

    def values(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """One number per masked token, the value before it was chosen: the head at the position
        before. 0 elsewhere."""
        return scatter_to_tokens(self(tokens, predicting_positions(mask)), mask)


class AdaptedScalar(ScalarModel):
    """A reward model or a critic that is an adapter and a head on a policy's trunk, which belongs
    to somebody else."""

    def __init__(
        self, language_model: Any, adapter: str, pad_token_id: int | None, seed: int
    ) -> None:
        nn.Module.__init__(self)
        self.view, self.pad_token_id, self.mean = (
            AdapterView(language_model, adapter),
            pad_token_id,
            0.0,
        )
        self.head = nn.Linear(
            language_model.config.get_text_config().hidden_size,
            1,
            bias=False,
            device=language_model.device,
        )
        self.collect_parameters()
        initialise(self.head, seed)

    def collect_parameters(self) -> None:
        """For the parameters of its adapter: once the trunk is in parts they are others."""
        self.adapted = nn.ParameterList(adapter_parameters(self.view.model, str(self.view.adapter)))

    @property
    def centre(self) -> float:
        return self.mean

    @centre.setter
    def centre(self, mean: float) -> None:
        self.mean = mean

    def hidden(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N H"]:
        with self.view.active():
            return hidden_states(self.view.model.base_model, tokens, output_mask)

    def save(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """As a whole, for others; and in `adapter/` what `attach` puts on the same trunk again."""
        tensors = full_state_dict(self.view.model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return
        prefix = f"{self.view.model.base_model_prefix}."
        trunk = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        self._whole(trunk).save(folder, tokenizer)
        adapter = folder / "adapter"
        save_adapter(self.view.model, str(self.view.adapter), adapter, tensors)
        save_file(
            {"score.weight": self.head.weight}, adapter / HEAD, metadata={"centre": repr(self.mean)}
        )

    def save_per_token(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        tensors = full_state_dict(self.view.model.base_model, keep=process_group.is_rank_zero)
        if process_group.is_rank_zero:
            self._whole(tensors).save_per_token(folder, tokenizer)

    def _whole(self, trunk: Mapping[str, Tensor]) -> ScalarModel:
        with self.view.active():
            whole = ScalarModel.from_trunk(
                self.view.model, self.pad_token_id, seed=0, tensors=trunk
            )
        with torch.no_grad():
            whole.head.weight.copy_(self.head.weight)
        whole.centre = self.mean
        return whole


def attach(language_model: Any, adapter: str, folder: Path) -> AdaptedScalar:
    """The adapter and head of a folder that `AdaptedScalar.save` wrote, on the trunk they were
    trained on; frozen."""
    load_adapter(language_model, adapter, folder)
    made = AdaptedScalar(language_model, adapter, None, seed=0)
    with safe_open(folder / HEAD, "pt") as file, torch.no_grad():
        made.head.weight.copy_(file.get_tensor("score.weight"))
        made.mean = float(file.metadata()["centre"])
    return made.requires_grad_(False)


HEAD = "head.safetensors"


def scores_last_token(config: Any) -> bool:
    """Whether the sequence classifier of this architecture is a causal trunk read at its last
    token, which transformers calls `score`, and not an encoder that wants its own special tokens
    around the text."""
    with torch.device("meta"):
        return hasattr(AutoModelForSequenceClassification.from_config(config), "score")


def head_of(model: Any) -> nn.Linear:
    """The linear layer to the labels: `score`, or in some token classifiers `classifier`."""
    per_token = type(model).__name__.endswith("ForTokenClassification")
    head = getattr(model, "score", None) or (
        getattr(model, "classifier", None) if per_token else None
    )
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__}: is not read at a token by a head called score, as decoders "
            f"are."
        )
    return head


def initialise(head: nn.Linear, seed: int) -> None:
    """N(0, 1/√(d + 1))."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.empty(head.weight.shape).normal_(
            0, 1 / math.sqrt(head.in_features + 1), generator=noise
        )
        head.weight.copy_(drawn)


def _one_label(config: Any, name: str) -> dict[str, Any]:
    return {**config.to_dict(), "id2label": {0: name}, "label2id": {name: 0}}


def take_frozen(source: Any, target: Any) -> None:
    """Parameters of the source that are not trained take the place of the target's own of the same
    name."""
    for name, p in source.named_parameters():
        if not p.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(target.get_submodule(module), leaf, p)


class ValueHead(nn.Module):
    """A linear layer to one number on hidden states that somebody else computed; it starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N"]:
        return at_least_float32(self.linear(hidden).squeeze(-1))
