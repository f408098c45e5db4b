"""Export: a model of a run as a folder of its own, in a precision of choice."""

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from quartet.files import readable_weights
from quartet.models.classifiers import define_classifier
from quartet.models.language_model import (
    OWN_CODE,
    UNLOADABLE,
    ModelError,
    check_whole,
    first_line,
    load_tokenizer,
    read_config,
)
from quartet.tensors import is_finite

Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHTS = ".safetensors"
CLASSIFIERS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""Auto classes by the end of an architecture's name; architectures with other names are language
models."""


class DamagedModel(ModelError):
    """A model folder with damaged, missing or foreign files."""


def export(folder: Path, target: Path, dtype: Dtype | None = None) -> None:
    """Copy a Hugging Face folder, with its floating-point weights cast to `dtype` if one is given.

    The copy is checked before it gets its final name. Raises DamagedModel if the folder is not a
    whole model, ModelError if a weight is too large for float16 or the target exists; nothing is
    left of the copy then.
    """
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target}: exists already. Give another place with --to.")
    _refuse_links(folder)
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _copy(folder, unfinished)
        try:
            check_model(unfinished)
        except ModelError as error:
            raise DamagedModel(str(error).replace(str(unfinished), str(folder))) from error
        if dtype is not None:
            for file in unfinished.glob(
                f"*{WEIGHTS}"
            ):  # an adapter, in a folder below, keeps its precision
                _cast(file, getattr(torch, dtype))
            config = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            (unfinished / "config.json").write_text(
                json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8"
            )
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder. Raises OSError for the first file that cannot be copied, such as on a full
    disk; shutil's own error lists all of them."""
    try:
        shutil.copytree(folder, target, symlinks=True)
    except shutil.Error as error:
        reason = str(error.args[0][0][2])
        known = re.match(r"\[Errno (\d+)\] ([^:]*)", reason)
        if known is None:
            raise OSError(reason) from error
        raise OSError(int(known[1]), known[2]) from error


def check_model(folder: Path) -> None:
    """Raise ModelError if a folder is not a whole model.

    transformers must load it as its config says, with exactly the weights that the architecture
    has, all finite, and with a tokenizer. The model is in memory once, in its own precision.
    """
    for file in sorted(folder.rglob(f"*{WEIGHTS}")):
        _check_weights(folder, file)
    config = read_config(folder)
    kind = str((config.architectures or [""])[0])
    if kind.endswith("ForSequenceClassification"):
        define_classifier(config)
    auto: Any = next(
        (auto for ending, auto in CLASSIFIERS.items() if kind.endswith(ending)),
        AutoModelForCausalLM,
    )
    try:
        model, report = auto.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **OWN_CODE,
        )
    except UNLOADABLE as error:
        raise ModelError(
            f"{folder}: cannot be loaded as {kind or 'a language model'} ({first_line(error)})."
        ) from error
    check_whole(folder, model, report)
    load_tokenizer(folder, generates=auto is AutoModelForCausalLM)


def _check_weights(folder: Path, file: Path) -> None:
    """Raise ModelError if the header of a file of weights does not fit the file (a gap, an overlap,
    a truncated end) or a number is not finite."""
    name = file.relative_to(folder)
    try:
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(key)
                if not is_finite(tensor):
                    raise ModelError(
                        f"{folder}: {key} in {name} is not finite: the weights are damaged."
                    )
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder}: {name} cannot be read ({first_line(error)}).") from error


def _refuse_links(folder: Path) -> None:
    """Raise DamagedModel for links, which could copy any file of this machine, and for other
    special files: reading a named pipe would block."""
    for path in (folder, *sorted(folder.rglob("*"))):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            what = "a link" if stat.S_ISLNK(mode) else "no ordinary file"
            raise DamagedModel(
                f"{path}: is {what}, and only files and folders are exported. Put the file in its "
                f"place."
            )


def _cast(file: Path, dtype: torch.dtype) -> None:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
            if not torch.isfinite(tensors[name]).all():
                raise ModelError(
                    f"{name} has weights up to {float(tensor.abs().max()):.3g}, too large for "
                    f"float16. Use bfloat16."
                )
    save_file(tensors, file, metadata)
    readable_weights(file)
