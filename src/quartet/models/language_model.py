"""Causal language models and their tokenizers: made from a config, loaded from a Hugging Face
folder, saved as one.

Models stay in evaluation mode for life, also while they are trained: dropout between sampling and
learning would make the ratio of PPO differ from 1 before anything was learnt.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError as HfHubError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.errors import QuartetError
from quartet.models.adapters import POLICY, AdapterView, adapters_of, merged_state, save_adapter
from quartet.models.logprobs import (
    head_statistics,
    logits_statistics,
    predicting_positions,
    scatter_to_tokens,
)
from quartet.models.shape import Shape
from quartet.models.trunk import checkpointing, hidden_states
from quartet.tensors import Bool, Float, Int, Tensor


class ModelError(QuartetError, ValueError):
    """A folder that cannot be used as asked: one sentence that says why and what to do."""


OWN_CODE = {"trust_remote_code": False}
"""Code that a folder brings along is never run. Left unsaid, transformers would ask on the
terminal."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def create(shape: Shape, tokenizer: Any, seed: int) -> nn.Module:
    """A causal language model of this shape for this tokenizer, with random weights from the
    seed."""
    config = AutoConfig.for_model(
        shape.type,
        **shape.hugging_face(vocabulary=len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def load_model(folder: str | Path, device: torch.device | None = None) -> Any:
    """The causal language model of a Hugging Face folder or hub id. Weights come from safetensors
    only; code that a folder brings along is not run."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **OWN_CODE
        )
    except UNLOADABLE as error:
        raise ModelError(
            f"{folder}: cannot be loaded as a language model ({first_line(error)})."
        ) from error
    check_whole(folder, model, report)
    return model.to(device).eval()


UNLOADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
    SafetensorError,
)
"""What transformers raises for folders that are damaged, or not what their config says."""


@torch.no_grad()
def check_whole(folder: str | Path, model: Any, report: Mapping[str, Any]) -> None:
    """All weights came from the folder, all of the folder's weights found a place, and all are
    numbers."""
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: has no weights for {missing[0]}, which would be random. Is its config.json "
            f"its own?"
        )
    layers = [
        name
        for name in sorted(report["unexpected_keys"])
        if ".layers." in name and "rotary" not in name
    ]
    if layers:
        raise ModelError(
            f"{folder}: has weights for {layers[0]}, which its config.json does not know. Is it "
            f"its own?"
        )
    check_finite(folder, model)


@torch.no_grad()
def check_finite(folder: str | Path, model: Any) -> None:
    """Raise ModelError where a weight is no number, or infinite."""
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            raise ModelError(f"{folder}: {name} is not finite: the weights are damaged.")


def load_tokenizer(folder: str | Path, generates: bool = True) -> Any:
    """The tokenizer of a Hugging Face folder or hub id. Where the model generates, it must know its
    end-of-sequence token."""
    if Path(folder).is_dir() and not any(
        (Path(folder) / name).is_file() for name in TOKENIZER_FILES
    ):
        raise ModelError(
            f"{folder}: has no tokenizer. Save one beside the model, or name another folder in "
            f"policy.tokenizer."
        )
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, **OWN_CODE)
    except (*UNLOADABLE, ImportError) as error:
        raise ModelError(
            f"{folder}: has no tokenizer that transformers can load ({first_line(error)}). "
            "Save one beside the model, or name another folder in policy.tokenizer."
        ) from error
    if generates and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer has no end-of-sequence token, so no answer could ever end. "
            f"Set eos_token in it."
        )
    return tokenizer


def read_config(folder: str | Path) -> Any:
    """The config of a model folder or hub id, without its weights. Of a folder it is also checked
    that there are weights which may be loaded."""
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json, so it is not a Hugging Face model folder.")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: has no .safetensors weights. Other formats can run code when they are "
            f"read, so they are not."
        )
    try:
        return AutoConfig.from_pretrained(folder, **OWN_CODE)
    except CONFIG_ERRORS as error:
        raise ModelError(f"{folder}: its config cannot be read ({first_line(error)}).") from error


CONFIG_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    HfHubError,
)


def _tokenizer_class(folder: str | Path) -> Any:
    """AutoTokenizer, except where the folder says that tokenizer.json is all there is to it.
    AutoTokenizer overrules that for some architectures (Qwen2) and decodes with the tokenizer of
    the original model."""
    config = Path(folder) / "tokenizer_config.json"
    if config.is_file() and (Path(folder) / "tokenizer.json").is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in {"TokenizersBackend", "PreTrainedTokenizerFast"}:
            return PreTrainedTokenizerFast
    return AutoTokenizer


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    process_group: ProcessGroup = SINGLE_PROCESS,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load. Of a model under an adapter
    the sum of both is saved, and the adapter alone in `adapter/`. `others`: what is saved in the
    place of parameters, by their names. Every rank of the team calls it, one writes."""
    adapted = adapters_of(model)
    tensors = full_state_dict(model, others, keep=process_group.is_rank_zero)
    if not process_group.is_rank_zero:
        return
    state = merged_state(model, tensors) if adapted else tensors
    if model.generation_config is not None and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    if adapted:
        save_adapter(model, POLICY, folder / "adapter", tensors)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids after which an answer is over: the tokenizer's end of sequence and whatever else the
    model's generation config lists (chat models end a turn with a token of its own)."""
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = [] if listed is None else [listed] if isinstance(listed, int) else listed
    return frozenset({tokenizer.eos_token_id, *more})


@dataclass(frozen=True)
class PositionOutputs:
    """What a model says at the positions that speak of the masked tokens, N of them."""

    hidden: Float[Tensor, "N H"]
    """The last hidden states."""
    logits: Float[Tensor, "N V"] | None
    """Where the head is more than a linear layer on them; elsewhere they are made when they are
    asked for, in chunks."""


_LINEAR_HEADS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@torch.no_grad()
def has_linear_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the last hidden states and nothing else. Some
    architectures scale or squash them (Gemma 2, Cohere, Granite); asked once per model, by
    looking."""
    if model not in _LINEAR_HEADS:
        tokens = (
            torch.arange(4, device=model.device)[None]
            % model.get_output_embeddings().weight.shape[0]
        )
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model(input_ids=tokens, use_cache=False).logits
        made = model.get_output_embeddings()(hidden)
        _LINEAR_HEADS[model] = made.shape == logits.shape and torch.allclose(
            made, logits, atol=1e-5, rtol=1e-5
        )
    return _LINEAR_HEADS[model]


def forward_positions(
    model: Any, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> PositionOutputs:
    """One pass over right-padded rows."""
    if isinstance(model, AdapterView):
        with model.active():
            return forward_positions(model.model, tokens, mask)
    at = predicting_positions(mask)
    if has_linear_head(model):
        return PositionOutputs(hidden_states(model.base_model, tokens, at), None)
    with checkpointing(model):
        output = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return PositionOutputs(output.hidden_states[-1][at], output.logits[at])


def logits_of(model: Any, outputs: PositionOutputs) -> Float[Tensor, "N V"]:
    return (
        model.get_output_embeddings()(outputs.hidden) if outputs.logits is None else outputs.logits
    )


def statistics(
    model: Any,
    outputs: PositionOutputs,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """log-probs and entropies of the masked tokens, each under its own token, 0 elsewhere."""
    if outputs.logits is None:
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        found = head_statistics(
            outputs.hidden, head.weight, bias, tokens[mask], temperature, entropy_gradient
        )
    else:
        found = logits_statistics(outputs.logits, tokens[mask], temperature, entropy_gradient)
    logprobs, entropy = found
    return scatter_to_tokens(logprobs, mask), scatter_to_tokens(entropy, mask)


def masked_logprobs(
    model: Any, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """log-probs of the masked tokens of right-padded rows, 0 elsewhere."""
    return statistics(model, forward_positions(model, tokens, mask), tokens, mask, temperature)[0]


@torch.no_grad()
def policy_logprobs(
    model: Any,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Float[Tensor, "B T"]:
    """What a model gives the masked tokens of right-padded rows, 0 elsewhere; each rank goes
    through its share."""
    logprobs = torch.zeros(
        tokens.shape, dtype=torch.promote_types(model.dtype, torch.float32), device=tokens.device
    )
    for piece in process_group.micro_batches(lengths.tolist(), micro_batch_tokens):
        rows, width = piece.rows, int(lengths[piece.rows].max())
        found = masked_logprobs(model, tokens[rows, :width], mask[rows, :width], temperature)
        if piece.counts:
            logprobs[rows, :width] = found
    process_group.all_reduce(logprobs)
    return logprobs
