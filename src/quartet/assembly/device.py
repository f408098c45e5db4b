"""The device that a rank computes on."""

from pathlib import Path

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.texts import excerpt
from quartet.models.language_model import ModelError
from quartet.models.precision import best_precision
from quartet.planning.device import Device

GPUS = {"cuda": "NVIDIA", "mps": "Apple"}
"""The makers of GPUs, by torch's names for the devices."""
DRIVER = Path("/proc/driver/nvidia/version")
"""What Linux has where a driver for GPUs of NVIDIA is loaded."""


def device(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """Return the device of this rank for the name in the config. Of several GPUs each rank gets
    one, which becomes the current device of this thread. Raises `ModelError` if it cannot be
    used."""
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
        # Filled by a kernel: a build of torch may have none for a GPU that is older or newer.
        found = torch.ones(1, device=name).device
        if found.type == "cuda":  # CUDA graphs, and libraries with kernels of their own, ask for it
            torch.cuda.set_device(found)
        return found
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'run.device = "{name}": cannot be used here ({excerpt(str(error), 100)}).'
        ) from error


def planned_device(found: torch.device) -> Device:
    """Return a device as a plan needs it."""
    if found.type != "cuda":
        return Device(found.type)
    properties = torch.cuda.get_device_properties(found)
    memory = float(properties.total_memory)
    return Device("cuda", properties.name, memory, best_precision(found) == "bf16")


def unused_gpu(found: torch.device) -> str | None:
    """Return a sentence where this machine has a GPU of NVIDIA that torch cannot use; `found` is
    the device that "auto" has become."""
    if found.type != "cpu" or not DRIVER.exists():
        return None
    build = torch.version.cuda
    why = "is a build for CPUs" if build is None else f"is built for CUDA {build}"
    return (
        f"this machine has a driver for NVIDIA GPUs, and torch finds none: torch "
        f"{torch.__version__} {why}. Install one that fits the driver (nvidia-smi shows the newest "
        'CUDA that it runs). run.device = "cpu" takes this sentence away.'
    )
