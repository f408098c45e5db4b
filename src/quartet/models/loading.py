"""Models that are built before their weights are read, so that a process reads only what it keeps.

`skeleton` (`models/skeleton.py`) makes a model whose parameters have shapes and no memory.
Adapters, precision and sharding are decided on it. `fill` then reads the weights one tensor at a
time: of a sharded parameter this rank's rows only, in the dtype that the parameter is held in.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from quartet.distributed.sharding import copy_saved, local_tensor
from quartet.models.language_model import UNLOADABLE, ModelError, first_line, load_model
from quartet.models.quantize import NF4Linear
from quartet.tensors import Tensor

IN_IMAGE_MODEL = r"^(model\.)?language_model\."
"""What the name of a weight of the language model begins with in a model with images. Behind it is
the weight's own name, or that without "model."."""
Rows = Any
"""A tensor, or an object that reads the rows of one when it is sliced."""


CHECKED_AT_ONCE = 2**24
"""How many numbers are looked at together, whether they are finite."""


class FileRows:
    """The rows of a tensor in a safetensors file, read when it is sliced.

    The file is open only meanwhile: what was read of an open one counts as memory of the process.
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    @property
    def shape(self) -> torch.Size:
        with safe_open(self.file, "pt") as opened:
            return torch.Size(opened.get_slice(self.name).get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            read: Tensor = opened.get_slice(self.name)[rows]
        return read


class FolderWeights(Mapping[str, Rows]):
    """The tensors of a Hugging Face folder or hub id by name. Nothing is read before a tensor is
    sliced."""

    def __init__(self, folder: str | Path) -> None:
        self.name_in_file: dict[str, str] = {}
        """The names that differ there."""
        path = Path(folder)
        if not path.is_dir():
            path = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors*"]))
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            names = dict.fromkeys(_names_in(path / "model.safetensors"), "model.safetensors")
        held = {file: _names_in(path / file) for file in sorted(set(names.values()))}
        self.files = {name: path / file for name, file in names.items() if name in held[file]}

    def __getitem__(self, name: str) -> Rows:
        return FileRows(self.files[name], self.name_in_file.get(name, name))

    def of_text(self, wanted: Collection[str]) -> None:
        """Give the weights of the language model in a model with images their names in a language
        model, and leave out what is not wanted."""
        renamed = {re.sub(IN_IMAGE_MODEL, "", name): name for name in self.files}
        renamed = {
            own: name
            for own in wanted
            if (name := renamed.get(own) or renamed.get(own.removeprefix("model.")))
        }
        self.files = {own: self.files[name] for own, name in renamed.items()}
        self.name_in_file = renamed

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _names_in(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def weights_for(
    model: Any, folder: str | Path, translated: Callable[[], Mapping[str, Tensor]] | None = None
) -> Mapping[str, Rows]:
    """Return the weights of a folder or hub id by the model's own names.

    Where the folder has other names, `translated` reads all weights into main memory by
    transformers, which knows them; by default as a language model. Raises ModelError.
    """
    try:
        weights = FolderWeights(folder)
    except UNLOADABLE as error:
        raise ModelError(f"{folder}: cannot be loaded ({first_line(error)}).") from error
    own = own_weights(model).keys()
    if own <= weights.keys():
        return weights
    weights.of_text(own)
    if own == weights.keys():
        return weights
    if translated is not None:
        return translated()
    state: dict[str, Tensor] = load_model(folder).state_dict()
    return state


def trunk_weights(model: Any, weights: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return the weights of a language model's trunk, by the names that they have in the trunk."""
    prefix = f"{model.base_model_prefix}."
    return {n.removeprefix(prefix): weights[n] for n in weights if n.startswith(prefix)}


def own_weights(model: Any) -> dict[str, Tensor]:
    """Return the parameters and buffers that a folder of the model holds, by their names there:
    without adapters, and a weight with two names once."""
    first_names: dict[int, str] = {}
    own = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        in_adapter = any(part.startswith("lora_") for part in name.split("."))
        if not in_adapter and first_names.setdefault(id(tensor), name) == name:
            own[name.replace(".base_layer.", ".")] = tensor
    return own


@torch.no_grad()
def fill(model: Any, weights: Mapping[str, Rows], device: torch.device, source: Any) -> Any:
    """Read the weights of a skeleton, put the model on the device, and return it.

    Parameters that have memory elsewhere, such as a new adapter's, are only moved. `source` is what
    errors call the weights. Raises ModelError for a weight that is missing, has another shape, or
    is not finite, and for layers that the model does not have.
    """
    quantized = {id(m.weight): m for m in model.modules() if isinstance(m, NF4Linear)}
    own = own_weights(model)
    _check_names(own, weights, source)
    _allocate(model, device, leave=quantized.keys())
    for name, held in own_weights(model).items():
        rows = weights[name]
        if id(held) in quantized:
            whole = (rows if isinstance(rows, torch.Tensor) else rows[:]).to(device)
            _check_finite(name, whole, source)
            quantized[id(held)].store(whole)
        else:
            copy_saved(held, rows)
            _check_finite(name, local_tensor(held), source)
    return model.to(device)


def _check_names(own: Mapping[str, Tensor], weights: Mapping[str, Rows], source: Any) -> None:
    """Raise ModelError unless the weights are those of the model, in their shapes."""
    unknown = [n for n in weights if ".layers." in n and "rotary" not in n and n not in own]
    if unknown:
        raise ModelError(
            f"{source}: has weights for {unknown[0]}, which its config.json does not know. Is it "
            "its own?"
        )
    for name, held in own.items():
        if name not in weights:
            raise ModelError(
                f"{source}: has no weights for {name}, which would be random. Is its config.json "
                "its own?"
            )
        shape = list(weights[name].shape)
        if shape != list(held.shape):
            raise ModelError(
                f"{source}: {name} has the shape {shape}, and by its config.json "
                f"{list(held.shape)}. Is it its own?"
            )


def _check_finite(name: str, weight: Tensor, source: Any) -> None:
    if not weight.is_floating_point():
        return
    if not all(bool(part.isfinite().all()) for part in weight.flatten().split(CHECKED_AT_ONCE)):
        raise ModelError(f"{source}: {name} is not finite: the weights are damaged.")


def _allocate(model: Any, device: torch.device, leave: Collection[int]) -> None:
    """Give memory on the device to all parameters that have none, but for those with an id in
    `leave`. A parameter that modules share stays one."""
    allocated: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta and id(p) not in leave:
                if id(p) not in allocated:
                    empty = torch.empty_like(p, device=device)
                    allocated[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                module._parameters[name] = allocated[id(p)]
