"""Causal language models and their tokenizers: made from a config, loaded from a Hugging Face folder, saved as one.

Models stay in evaluation mode for life, also while they are trained: dropout between sampling and learning would make
the ratio of PPO differ from 1 before anything was learnt.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quartet.models.logprobs import speak_of_own_token, token_entropy, token_logprobs
from quartet.models.padding import first_response_column, micro_batches
from quartet.models.shape import Shape
from quartet.tensors import Bool, Float, Int, Tensor


class ModelError(ValueError):
    """A folder that cannot be used as asked: one sentence that says why and what to do."""


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def create(shape: Shape, tokenizer: Any, seed: int) -> nn.Module:
    """A causal language model of this shape for this tokenizer, with random weights from the seed."""
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
    """The causal language model of a Hugging Face folder or hub id. Weights come from safetensors only; code that a
    folder brings along is not run."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded as a language model ({first_line(error)}).") from error
    return model.to(device).eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder or hub id. It must know its end-of-sequence token."""
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder}: has no tokenizer. Save one beside the model, or name another folder in policy.tokenizer.")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{folder}: has no tokenizer that transformers can load ({first_line(error)}). "
            "Save one beside the model, or name another folder in policy.tokenizer."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer has no end-of-sequence token, so no answer could ever end. Set eos_token in it."
        )
    return tokenizer


def read_config(folder: str | Path) -> Any:
    """The config of a model folder or hub id, without its weights. Of a folder it is also checked that there are weights
    which may be loaded."""
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json, so it is not a Hugging Face model folder.")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: has no .safetensors weights. Other formats can run code when they are read, so they are not."
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its config cannot be read ({first_line(error)}).") from error


def _tokenizer_class(folder: str | Path) -> Any:
    """AutoTokenizer, except where the folder says that tokenizer.json is all there is to it. AutoTokenizer overrules that for
    some architectures (Qwen2) and decodes with the tokenizer of the original model."""
    config = Path(folder) / "tokenizer_config.json"
    if config.is_file() and (Path(folder) / "tokenizer.json").is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in {"TokenizersBackend", "PreTrainedTokenizerFast"}:
            return PreTrainedTokenizerFast
    return AutoTokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids after which an answer is over: the tokenizer's end of sequence and whatever else the model's generation
    config lists (chat models end a turn with a token of its own)."""
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = [] if listed is None else [listed] if isinstance(listed, int) else listed
    return frozenset({tokenizer.eos_token_id, *more})


def response_logits(
    model: Any, tokens: Int[Tensor, "B T"], first: int, hidden: bool = False
) -> tuple[Float[Tensor, "B n V"], Float[Tensor, "B n H"] | None]:
    """Logits, and hidden states where asked for, at the positions that speak of the tokens from `first` on. Earlier
    positions, the prompt's, never reach the vocabulary. Rows are padded on the right, so that no real token can see
    padding and its position is its index: neither an attention mask nor position ids are needed."""
    speaking = torch.arange(first - 1, tokens.shape[1] - 1, device=tokens.device)
    output = model(input_ids=tokens, logits_to_keep=speaking, use_cache=False, output_hidden_states=hidden)
    return output.logits, output.hidden_states[-1][:, speaking] if hidden else None


def logprobs_and_entropy(
    logits: Float[Tensor, "B n V"],
    tokens: Int[Tensor, "B T"],
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Of the tokens that `response_logits` spoke of, each at its own token, 0 before."""
    width = tokens.shape[1]
    spoken_of = tokens[:, width - logits.shape[1] :]
    logprobs = token_logprobs(logits, spoken_of, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = token_entropy(logits, temperature)
    return speak_of_own_token(logprobs, width), speak_of_own_token(entropy, width)


@torch.no_grad()
def policy_logprobs(
    model: Any,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    micro_batch_tokens: int,
) -> Float[Tensor, "B T"]:
    """What a model gives the masked tokens of right-padded rows, 0 elsewhere."""
    logprobs = torch.zeros(tokens.shape, device=tokens.device)
    for rows in micro_batches(lengths.tolist(), micro_batch_tokens):
        width = int(lengths[rows].max())
        piece = tokens[rows, :width]
        logits, _ = response_logits(model, piece, first_response_column(mask[rows, :width]))
        logprobs[rows, :width] = logprobs_and_entropy(logits, piece, temperature)[0]
    return torch.where(mask, logprobs, 0.0)
