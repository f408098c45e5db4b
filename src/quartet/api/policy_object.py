"""A policy that is given as an object: what a folder cannot hold of it is refused, the rest is
written to one, from which the run reads it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quartet import files
from quartet.config.toml import ConfigError
from quartet.files import fingerprint
from quartet.io.texts import excerpt
from quartet.runtime.log import no_progress_bars

LIBRARIES = {"torch", "transformers", "accelerate"}
"""Whose hooks belong to what they do themselves, such as to record hidden states."""


def check_whole(model: Any, trains: bool) -> None:
    """Raise `ConfigError` for an object that is no whole model and, where it is trained, for
    weights that are not: a folder cannot say so."""
    if isinstance(model, type):
        raise ConfigError(
            f"policy: {model.__name__} is a class. Give a model: from_pretrained(…) loads one."
        )
    if isinstance(model, Mapping) and any(hasattr(weight, "dtype") for weight in model.values()):
        raise ConfigError(
            "policy: a state dict, which is weights without a model. Give the model that has them, "
            "with its tokenizer."
        )
    if getattr(model, "peft_config", None):
        raise ConfigError(
            "policy: a model with an adapter of PEFT. Give the model without it and policy.adapter "
            '= {"type": "lora", "rank": 16}, or what merge_and_unload().requires_grad_() returns.'
        )
    weights = model.named_parameters() if trains and hasattr(model, "save_pretrained") else ()
    if frozen := next((name for name, weight in weights if not weight.requires_grad), None):
        raise ConfigError(
            f"policy: {frozen} has requires_grad = False, which a run does not keep. Set "
            "policy.frozen_layers, or call requires_grad_() on the model."
        )


def check_is_its_folder(model: Any) -> None:
    """Raise `ConfigError` for a model that computes something else than the one that transformers
    loads from its folder, which the run would train: one of another class, with a module of another
    class inside, or with hooks."""
    from quartet.models.skeleton import skeleton
    from quartet.models.text_part import auto_class

    model = getattr(model, "_orig_mod", model)  # under torch.compile
    auto, kind = auto_class(model.config), type(model)
    loaded = getattr(auto, "_model_mapping", {}).get(type(model.config), None)
    if not isinstance(loaded, type):
        return
    if kind is not loaded:
        raise ConfigError(
            f"policy: a {kind.__name__}. A run reads its weights and its config from a folder, as "
            f"a {loaded.__name__}, without code of your own. Give a {loaded.__name__}."
        )
    for name, hook in _own_hooks(model):
        raise ConfigError(
            f"policy: {name or kind.__name__} has the hook {hook}, which the run would not call: "
            "it reads weights and config from a folder. Remove the hook."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        return  # whose modules are made while weights are loaded
    for name, theirs in skeleton(model.config, auto).named_modules():
        ours = type(model.get_submodule(name)) if _has(model, name) else None
        if ours is not type(theirs):
            raise ConfigError(
                f"policy: {name} is {'not there' if ours is None else _named(ours)}, where the "
                f"model that is loaded from its folder has {_named(type(theirs))}. Give a model as "
                "from_pretrained(…) or from_config(…) makes it."
            )


def _own_hooks(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the user's hooks on forward and backward passes: the module's name and the hook's."""
    for name, module in model.named_modules():
        for kind in ("forward_pre", "forward", "backward_pre", "backward"):
            for hook in getattr(module, f"_{kind}_hooks", {}).values():
                if getattr(hook, "__module__", "").partition(".")[0] not in LIBRARIES:
                    yield name, getattr(hook, "__name__", type(hook).__name__)


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _named(kind: type) -> str:
    """Return "a" or "an" and the name of a class."""
    return f"a{'n' * (kind.__name__[0] in 'AEIOU')} {kind.__name__}"


def store_model(model: Any, tokenizer: Any, store: Path) -> Path:
    """Write a model and its tokenizer as a Hugging Face folder and return its path. The model
    itself is not changed by the run: it trains what it reads from there."""
    store.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".policy-", dir=store))
    try:
        try:
            with no_progress_bars():
                model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        except (OSError, MemoryError):  # of the disk and the machine, not of the model
            raise
        except Exception as error:
            raise ConfigError(
                "policy: the model and its tokenizer cannot be written to a folder, which the run "
                f"reads: {excerpt(str(error), 300).rstrip('.')}."
            ) from error
        sums = [f"{path.name} {fingerprint(path)['sha256']}" for path in sorted(beside.iterdir())]
        files.write(beside / "CHECKSUMS", "\n".join(sums) + "\n")
        path = store / f"policy-{fingerprint(beside / 'CHECKSUMS')['sha256'][:12]}"
        if not path.exists():
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path
