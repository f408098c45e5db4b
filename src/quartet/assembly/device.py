"""The device that a rank computes on."""

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.texts import excerpt
from quartet.models.language_model import ModelError

GPUS = {"cuda": "NVIDIA", "mps": "Apple"}
"""The makers of GPUs, by torch's names for the devices."""


def device(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """Return the device of this rank for the name in the config. Of several GPUs each rank gets
    one. Raises `ModelError` if it cannot be used."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = name.partition(":")[0]
    if kind in GPUS and not getattr(torch, kind).is_available():
        raise ModelError(
            f'run.device = "{name}": torch finds no {GPUS[kind]} GPU on this machine. Write "cpu", '
            'or leave it out: "auto" takes a GPU where there is one.'
        )
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{process_group.local_rank % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'run.device = "{name}": cannot be used here ({excerpt(str(error), 100)}).'
        ) from error
