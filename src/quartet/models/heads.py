"""Scalar heads: one number per sequence (a reward model) or per token (a critic).

Both are a causal trunk with a linear layer to one number. A reward model uses its output at the
last real token, a critic at every token, so a critic can start as a copy of the reward model. They
are saved as Hugging Face folders that `AutoModelForSequenceClassification` and
`AutoModelForTokenClassification` load. On a policy's trunk, each is an adapter and a head.
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

from quartet.distributed.offload import MAIN_MEMORY
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.files import readable_weights
from quartet.models.adapters import (
    AdapterView,
    adapter_parameters,
    load_adapter,
    merged_state,
    save_adapter,
)
from quartet.models.classifiers import (
    auto_class,
    define_classifier,
    load_classifier,
    new_classifier,
    one_label,
    with_weights,
)
from quartet.models.language_model import ModelError, read_config, save_weights
from quartet.models.loading import Rows, fill, weights_for
from quartet.models.logprobs import at_least_float32, predicting_positions, scatter_to_tokens
from quartet.models.precision import compute_in
from quartet.models.protocols import CausalModel, Tokenizer, Trunk
from quartet.models.skeleton import skeleton
from quartet.models.trunk import hidden_states
from quartet.tensors import Bool, Float, Int, Tensor

CENTRE = "quartet_reward_centre"
"""The key of config.json with the mean that a reward model subtracts from its scores."""


class ScalarModel(nn.Module):
    """A Hugging Face sequence or token classifier with one label, used as a reward model or a
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
        language_model: CausalModel,
        pad_token_id: int | None,
        seed: int,
        share_frozen: bool = False,
    ) -> "ScalarModel":
        """Return the trunk of a language model under a new head with weights N(0, 1/√(d + 1)), the
        initialisation of Stiennon et al. 2020.

        The weights of the trunk are copied, with the active adapter merged; with `share_frozen`,
        those that are not trained are shared.
        """
        model = new_classifier(language_model.config, pad_token_id, with_weights)
        model.base_model.load_state_dict(merged_state(language_model.base_model))
        if share_frozen:
            take_frozen(language_model.base_model, model.base_model)
        scalar = cls(model.to(next(language_model.parameters()).device))
        initialise(scalar.head, seed)
        return scalar

    @classmethod
    def assembled(
        cls,
        language_model: CausalModel,
        trunk: Mapping[str, Tensor],
        head_weight: Tensor,
        centre: float,
        pad_token_id: int | None,
    ) -> "ScalarModel":
        """Return trunk and head as one model in main memory that can be saved, and nothing else.

        On a CPU it shares the weights of `trunk`, the gathered weights of the language model's
        trunk, except those that the active adapter changes.
        """
        model = new_classifier(language_model.config, pad_token_id, skeleton)
        state = merged_state(language_model.base_model, trunk, MAIN_MEMORY)
        state = {name: _to_be_saved(tensor) for name, tensor in state.items()}
        model.base_model.load_state_dict(state, assign=True)
        scalar = cls(model)
        scalar.head.weight = nn.Parameter(head_weight.detach().to(MAIN_MEMORY))
        scalar.centre = centre
        return scalar

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None) -> "ScalarModel":
        """Return the sequence or token classifier with one label of a Hugging Face folder."""
        return cls(load_classifier(auto_class(folder), folder, device))

    @classmethod
    def over(cls, config: Any, pad_token_id: int | None) -> "ScalarModel":
        """Return a scalar model for the trunk of a language model with this config. It has no
        weights yet; see `models/loading.py`."""
        return cls(new_classifier(config, pad_token_id, skeleton))

    @classmethod
    def of_folder(cls, folder: str | Path) -> "ScalarModel":
        """Return what `load` returns, without weights."""
        config = read_config(folder)
        define_classifier(config)
        return cls(skeleton(config, auto_class(folder)))

    def fill(
        self,
        folder: str | Path,
        device: torch.device,
    ) -> "ScalarModel":
        """Read the weights of a model that `of_folder` returned."""
        auto = auto_class(folder)
        weights = weights_for(
            self.model, folder, lambda: load_classifier(auto, folder, None).state_dict()
        )
        fill(self.model, weights, device, folder)
        return self

    def fill_trunk(
        self,
        trunk: Mapping[str, Rows],
        device: torch.device,
        source: Any,
        seed: int,
    ) -> "ScalarModel":
        """Read the trunk's weights of a model that `over` returned. Its head is new."""
        fill(self.model.base_model, trunk, device, source)
        self.head.to_empty(device=device)
        initialise(self.head, seed)
        return self

    def save(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Save as a sequence classifier, as other libraries expect a reward model. Every rank of
        the process group must call it; rank 0 writes."""
        state = full_state_dict(self.model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return
        save_weights(self.model, Path(folder), state)
        tokenizer.save_pretrained(folder)

    def save_per_token(
        self, folder: Path, tokenizer: Tokenizer, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Save as a token classifier, as other libraries expect a critic: its output at a token is
        the value after that token, and the centre is in the head's bias. Architectures without a
        token classifier are saved as `save` does."""
        config = AutoConfig.for_model(**one_label(self.model.config, "value"))
        setattr(config, CENTRE, 0.0)
        try:
            with torch.device("meta"):
                classifier = AutoModelForTokenClassification.from_config(
                    config, dtype=torch.float32
                )
        except ValueError:
            return self.save(folder, tokenizer, process_group)
        trunk = full_state_dict(self.model.base_model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return None
        trunk = {name: _to_be_saved(tensor) for name, tensor in trunk.items()}
        classifier.base_model.load_state_dict(trunk, assign=True)
        head = head_of(classifier).to_empty(device=MAIN_MEMORY)
        with torch.no_grad():
            head.weight.copy_(self.head.weight)
            bias = 0.0 if self.head.bias is None else self.head.bias.to(MAIN_MEMORY)
            head.bias.copy_(torch.zeros_like(head.bias) + bias - self.centre)
        classifier.save_pretrained(folder)
        readable_weights(*folder.glob("*.safetensors"))
        tokenizer.save_pretrained(folder)
        return None

    @property
    def centre(self) -> float:
        return float(getattr(self.model.config, CENTRE, 0.0))

    @centre.setter
    def centre(self, mean: float) -> None:
        setattr(self.model.config, CENTRE, mean)

    @property
    def trunk(self) -> Trunk:
        """The model without the head."""
        trunk: Trunk = self.model.base_model
        return trunk

    def compute_in(self, dtype: torch.dtype) -> "ScalarModel":
        """Have the trunk compute in this dtype; the head and its numbers stay in float32."""
        compute_in(self.model, dtype, self.head)
        return self

    def hidden(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N H"]:
        return hidden_states(self.trunk, tokens, output_mask)

    def forward(
        self, tokens: Int[Tensor, "B T"], output_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N"]:
        """Return the output of the head less the centre at the positions of the mask, of
        right-padded rows: the number after the token at that position."""
        return number_of(self.head, self.hidden(tokens, output_mask)) - self.centre

    def scores(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return one number per row: the output at the last real token."""
        last = torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None] - 1
        scores: Tensor = self(tokens, last)
        return scores

    def values(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return one number per masked token, the value before it was chosen: the output at the
        position before. 0 elsewhere."""
        return scatter_to_tokens(self(tokens, predicting_positions(mask)), mask)


class AdaptedScalar(ScalarModel):
    """A reward model or a critic that is an adapter and a head on a policy's trunk. The trunk is
    not among its parameters."""

    def __init__(
        self, language_model: CausalModel, adapter: str, pad_token_id: int | None, seed: int
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

    @property
    def trunk(self) -> Trunk:
        return self.view.model.base_model

    def compute_in(self, dtype: torch.dtype) -> "AdaptedScalar":
        """Do nothing: the trunk is the policy's, and computes as the policy does."""
        return self

    def collect_parameters(self) -> None:
        """Take up the parameters of the adapter. Sharding a trunk replaces them by others, so it
        must be called again afterwards."""
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
            return hidden_states(self.trunk, tokens, output_mask)

    def save(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Save a whole sequence classifier, and in `adapter/` what `attach` needs to put adapter
        and head on the same trunk again."""
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
        adapter = Path(folder) / "adapter"
        save_adapter(self.view.model, str(self.view.adapter), adapter, tensors)
        save_file(
            {"score.weight": self.head.weight.to(MAIN_MEMORY)},
            adapter / HEAD,
            metadata={"centre": repr(self.mean)},
        )
        readable_weights(adapter / HEAD)

    def save_per_token(
        self, folder: Path, tokenizer: Tokenizer, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        tensors = full_state_dict(self.view.model.base_model, keep=process_group.is_rank_zero)
        if process_group.is_rank_zero:
            self._whole(tensors).save_per_token(folder, tokenizer)

    def _whole(self, trunk: Mapping[str, Tensor]) -> ScalarModel:
        with self.view.active():
            return ScalarModel.assembled(
                self.view.model, trunk, self.head.weight, self.mean, self.pad_token_id
            )


def _to_be_saved(tensor: Tensor) -> Tensor:
    """Return a weight in main memory, and at least in float32."""
    return at_least_float32(tensor.to(MAIN_MEMORY))


def attach(
    language_model: CausalModel, adapter: str, folder: Path, pad_token_id: int | None = None
) -> AdaptedScalar:
    """Return the adapter and head of a folder that `AdaptedScalar.save` wrote, frozen, on the trunk
    that they were trained on. `pad_token_id` is written to the config if they are saved again."""
    load_adapter(language_model, adapter, folder)
    scalar = AdaptedScalar(language_model, adapter, pad_token_id, seed=0)
    with safe_open(folder / HEAD, "pt") as file, torch.no_grad():
        scalar.head.weight.copy_(file.get_tensor("score.weight"))
        scalar.mean = float(file.metadata()["centre"])
    return scalar.requires_grad_(False)


HEAD = "head.safetensors"


def scores_last_token(config: Any) -> bool:
    """Return whether the sequence classifier of this architecture is a causal trunk with a head at
    its last token, which transformers calls `score`, and not an encoder that needs special tokens
    around the text."""
    define_classifier(config)
    with torch.device("meta"):
        return hasattr(AutoModelForSequenceClassification.from_config(config), "score")


def head_of(model: Any) -> nn.Linear:
    """Return the linear layer to the labels: `score`, or in some token classifiers `classifier`."""
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


def number_of(head: nn.Linear, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N"]:
    """Return the output of a head with one label, in float32 at least."""
    parts = (hidden, head.weight, *([] if head.bias is None else [head.bias]))
    return nn.functional.linear(*map(at_least_float32, parts)).squeeze(-1)


def initialise(head: nn.Linear, seed: int) -> None:
    """Fill the weights of a head of input size d with N(0, 1/√(d + 1)); the standard deviation is
    the second number."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.empty(head.weight.shape).normal_(
            0, 1 / math.sqrt(head.in_features + 1), generator=noise
        )
        head.weight.copy_(weight)


def starting_at_zero(critic: ScalarModel) -> ScalarModel:
    """Set the head of a critic to 0, as Ziegler et al. 2019, so that all values are, and return it.
    Values of random weights grow with the norm of the hidden states: those of Gemma 3 270M began
    at −7 ± 5 where rewards were 0 to 1."""
    nn.init.zeros_(critic.head.weight)
    return critic


def take_frozen(source: Any, target: Any) -> None:
    """Replace parameters of the target by the source's of the same name that are not trained."""
    for name, p in source.named_parameters():
        if not p.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(target.get_submodule(module), leaf, p)


class ValueHead(nn.Module):
    """A linear layer from given hidden states to one number each; its weights start at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N"]:
        return number_of(self.linear, hidden)
