"""A model of a run as a folder of its own, in the precision it will be used in."""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quartet.models.language_model import ModelError

Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHTS = ".safetensors"


def export(folder: Path, target: Path, dtype: Dtype | None = None) -> None:
    """Copy a Hugging Face folder, its floating-point weights as `dtype` where one is given. ModelError where float16 has no
    room for a weight, or the target exists; nothing is left behind then."""
    if target.exists():
        raise ModelError(f"{target}: exists already. Give another place with --to.")
    beside = target.with_name(f".{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(folder, beside)
        if dtype is not None:
            for file in beside.glob(f"*{WEIGHTS}"):  # an adapter in a folder below stays as precise as it was
                _cast(file, getattr(torch, dtype))
            config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            (beside / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _cast(file: Path, dtype: torch.dtype) -> None:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
            if not torch.isfinite(tensors[name]).all() and torch.isfinite(tensor).all():
                raise ModelError(
                    f"{name} has weights up to {float(tensor.abs().max()):.3g}, too large for float16. Use bfloat16."
                )
    save_file(tensors, file, metadata)
