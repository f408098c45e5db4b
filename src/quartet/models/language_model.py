"""Causal language models and their tokenizers: created from a config, loaded from a Hugging Face
folder, saved as one.

Models stay in evaluation mode all the time, also while they are trained: dropout between sampling
and learning would make the ratio of PPO differ from 1 before anything was learnt.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError as HfHubError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from quartet import files
from quartet.distributed.offload import MAIN_MEMORY
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.errors import QuartetError
from quartet.files import readable_weights
from quartet.io.activity import activity, counted, writing
from quartet.models.adapters import (
    POLICY,
    adapters_of,
    merged_state,
    save_adapter,
)
from quartet.models.chat import turn_end
from quartet.models.hub import why_not_on_hub
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.models.quantize import NF4Linear
from quartet.models.shape import Shape
from quartet.models.text_part import auto_class, language_part, text_config
from quartet.tensors import Tensor, is_finite


class ModelError(QuartetError, ValueError):
    """A model folder that cannot be used; the message is one sentence that says why and what to
    do."""


OWN_CODE = {"trust_remote_code": False}
"""Code in a model folder is never run. Without this argument transformers would ask on the
terminal."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def create(shape: Shape, tokenizer: Tokenizer, seed: int) -> CausalModel:
    """Return a causal language model of this shape for this tokenizer, with random weights from the
    seed."""
    config = shape_config(shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: CausalModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def shape_config(shape: Shape, tokenizer: Tokenizer) -> Any:
    """Return the transformers config of this shape for this tokenizer."""
    return AutoConfig.for_model(
        shape.type,
        **shape.hugging_face(vocabulary=len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_model(folder: str | Path, device: torch.device | None = None) -> Any:
    """Return the causal language model of a Hugging Face folder or hub id, in float32. Weights are
    read from safetensors only, and code in the folder is not run. Raises ModelError, also for a
    classifier: transformers would load its trunk under a head that was never trained."""
    config = read_config(folder)
    check_generates(folder, config)
    try:
        model, report = auto_class(config).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **OWN_CODE
        )
    except UNLOADABLE as error:
        raise ModelError(
            f"{folder}: cannot be loaded as a language model ({first_line(error)})."
        ) from error
    check_whole(folder, model, report)
    return language_part(model).to(device).eval()


def language_config(folder: str | Path) -> Any:
    """Return the config of the language model that `load_model` returns. Raises ModelError."""
    return text_config(read_config(folder))


def check_generates(folder: str | Path, config: Any) -> None:
    """Raise ModelError where the config of a model says that it is a reward model or a critic."""
    kind = str((getattr(config, "architectures", None) or [""])[0])
    if kind.endswith(CLASSIFIERS):
        raise ModelError(
            f"{folder}: is a {kind}, which scores text and generates none. Name the folder of a "
            "language model."
        )


@torch.no_grad()
def add_embeddings(model: CausalModel, tokenizer: Tokenizer) -> None:
    """Add rows to the embeddings and the head of a model for tokens that only its tokenizer has.
    Each new row is the mean of the old ones, so that its logit is their mean (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models")."""
    rows, size = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if size <= rows:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None:
                tensor[rows:] = tensor[:rows].mean(0)


CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
"""The ends of the names of architectures that give numbers and no text."""
UNLOADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
    SafetensorError,
)
"""What transformers raises for folders that are damaged or do not fit their config."""


@torch.no_grad()
def check_whole(folder: str | Path, model: CausalModel, report: Mapping[str, Any]) -> None:
    """Raise ModelError if the model has weights that the folder lacks, the folder has weights of
    layers that the model lacks, or a weight is not finite. `report` is transformers' loading
    info."""
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
def check_finite(folder: str | Path, model: CausalModel) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    named = dict(model.named_parameters())
    for name, p in counted(named.items(), lambda _: 1, len(named), "tensors checked"):
        if not is_finite(p):
            raise ModelError(f"{folder}: {name} is not finite: the weights are damaged.")


def load_tokenizer(folder: str | Path, generates: bool = True) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder or hub id. Raises ModelError without one, or if
    the model `generates` and the tokenizer has no end-of-sequence token."""
    if Path(folder).is_dir() and not any(
        (Path(folder) / name).is_file() for name in TOKENIZER_FILES
    ):
        _check_is_no_run(folder)
        if not (Path(folder) / "config.json").is_file():
            raise ModelError(
                f"{folder}: is no model's folder, it has no config.json and no tokenizer. Name one "
                "that save_pretrained wrote."
            )
        raise ModelError(
            f"{folder}: has no tokenizer. Save one beside the model, or name another folder in "
            f"policy.tokenizer."
        )
    check_hub(folder)
    try:
        tokenizer: Tokenizer = _tokenizer_class(folder).from_pretrained(folder, **OWN_CODE)
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


def check_hub(name: str | Path) -> None:
    """Raise ModelError where a name is no folder here and the hub does not give the model."""
    if not files.exists(name) and (why := why_not_on_hub(str(name))) is not None:
        raise ModelError(f"{name}: is no folder here, and {why}")


def longest_of(config: Any) -> int:
    """Return the most tokens that a model of this config reads; 10⁹ for an architecture without a
    limit."""
    limit: int = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    return limit


def read_config(folder: str | Path) -> Any:
    """Return the config of a model folder or hub id. Raises ModelError, also for a local folder
    without safetensors weights."""
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        _check_is_no_run(folder)
        raise ModelError(f"{folder}: has no config.json, so it is not a Hugging Face model folder.")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: has no .safetensors weights. Other formats can run code when they are "
            f"read, so they are not."
        )
    check_hub(folder)
    try:
        return AutoConfig.from_pretrained(folder, **OWN_CODE)
    except CONFIG_ERRORS as error:
        raise ModelError(f"{folder}: its config cannot be read ({first_line(error)}).") from error


def _check_is_no_run(folder: str | Path) -> None:
    """Raise ModelError, which names the models of a run, where a folder is that of a run."""
    if not (Path(folder) / "events.jsonl").is_file():
        return
    models = sorted(str(path.parent) for path in Path(folder).glob("*/config.json"))
    its = "It has no model yet."
    if models:
        its = f"Its model{'s are' if models[1:] else ' is'} {' and '.join(models)}."
    raise ModelError(f"{folder}: is a run's folder. {its}")


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
    """Return the class to load a tokenizer with: AutoTokenizer, unless the folder says that
    tokenizer.json is all of its tokenizer. AutoTokenizer ignores that for some architectures
    (Qwen2) and decodes with the tokenizer of the original model."""
    config = Path(folder) / "tokenizer_config.json"
    if config.is_file() and (Path(folder) / "tokenizer.json").is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in {"TokenizersBackend", "PreTrainedTokenizerFast"}:
            return PreTrainedTokenizerFast
    return AutoTokenizer


def save(
    model: CausalModel,
    tokenizer: Tokenizer,
    folder: str | Path,
    process_group: ProcessGroup = SINGLE_PROCESS,
    replacements: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    A model with an adapter is saved with the adapter merged, and the adapter alone in `adapter/`.
    Weights are in float32; merged with a base in 4 bits, in bfloat16.
    `replacements` are saved in the place of the parameters of these names. Every rank of the
    process group must call it; rank 0 writes.
    """
    folder, adapted = Path(folder), adapters_of(model)
    tensors = full_state_dict(model, replacements, keep=process_group.is_rank_zero)
    if not process_group.is_rank_zero:
        return
    with activity("merging"):
        state = merged_state(model, tensors, MAIN_MEMORY) if adapted else tensors
    if model.generation_config is not None:
        ends = stop_ids(model, tokenizer)
        if ends != _listed_ends(model):
            model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else min(ends)
    in_4_bits = any(isinstance(module, NF4Linear) for module in model.modules())
    save_weights(model, folder, state, torch.bfloat16 if in_4_bits else torch.float32)
    tokenizer.save_pretrained(folder)
    if adapted:
        save_adapter(model, POLICY, folder / "adapter", tensors)


def save_weights(
    model: Any, folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write the config and the weights of a transformers model, all weights in this dtype.

    Weights that were held in bfloat16 are exact in float32, too. A tensor with two names stays one.
    Weights on a GPU are converted in main memory: it may have no room for all of them in float32.
    """
    tensors: dict[int, Tensor] = {}
    for tensor in state.values():
        converts = tensor.is_floating_point() and tensor.dtype != torch.float64
        if id(tensor) not in tensors:
            there = tensor.to(MAIN_MEMORY)
            tensors[id(tensor)] = there.to(dtype) if converts else there
    with writing(f"writing {folder.name}", folder, sum(t.nbytes for t in tensors.values())):
        model.save_pretrained(folder, state_dict={n: tensors[id(t)] for n, t in state.items()})
    readable_weights(*folder.glob("*.safetensors"))
    # transformers writes the dtype of the model's first parameter.
    path, name = folder / "config.json", str(dtype).removeprefix("torch.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") != name:
        path.write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def stop_ids(model: CausalModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a response: the tokenizer's end of sequence, the token with which its
    chat template ends a turn, and the others that the model's generation config lists."""
    return _listed_ends(model) | {tokenizer.eos_token_id, turn_end(tokenizer)}


def _listed_ends(model: CausalModel) -> frozenset[int]:
    """Return the ends of sequence that the model's generation config lists."""
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    return frozenset(() if listed is None else [listed] if isinstance(listed, int) else listed)
