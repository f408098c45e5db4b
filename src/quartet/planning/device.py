"""The device that a run would take on this machine, found without torch, which takes seconds to
import."""

import ctypes
import dataclasses
import importlib.util
import platform
import re
import runpy
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quartet.planning.hardware import GPUS, Gpu

DRIVER = "libcuda.so.1"
"""The library of NVIDIA's driver. Like torch, it counts the GPUs that CUDA_VISIBLE_DEVICES
leaves."""
CAPABILITY_MAJOR = 75
"""The number of an attribute of a GPU in CUDA's driver: its architecture, 9 for Hopper."""
AMPERE = 8
"""The first architecture of NVIDIA that computes in bfloat16."""


@dataclass(frozen=True)
class Device:
    """A device as a plan needs it."""

    kind: str
    """"cpu", "cuda" or "mps"."""
    name: str = ""
    """The maker's name of a GPU."""
    memory: float = 0.0
    """Bytes of a GPU."""
    has_bf16: bool = True
    """Whether it computes in bfloat16 by default, if it is a GPU."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU with the rates of its data sheet; None where they are not known."""
        words = re.findall(r"\w+", self.name.lower().replace("rtx ", "rtx"))
        known = next((GPUS[word] for word in words if word in GPUS), None)
        return None if known is None else dataclasses.replace(known, memory=self.memory)


CPU = Device("cpu")


def device_named(name: str) -> Device | None:
    """Return the device that `run.device` would be on this machine; None for one that is not here.
    Of several GPUs "auto" and "cuda" take the first."""
    kind, _, index = name.partition(":")
    if kind == "auto":
        is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
        return cuda_device(0) or (Device("mps") if is_apple else CPU)
    if kind == "cuda":
        return cuda_device(int(index) if index.isdecimal() else 0)
    return Device(kind)


@cache
def cuda_device(index: int) -> Device | None:
    """Return a GPU of NVIDIA by its number; None where there is none that torch could use."""
    if not _torch_has_cuda():
        return None
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    device, major, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    # Each returns 0 where it succeeds; `device` is read by those after the one that fills it in.
    found = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDeviceGetName(name, len(name), device) == 0
        and driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device) == 0
    )
    if not found:
        return None
    words = name.value.decode("utf-8", "replace")
    return Device("cuda", words, float(memory.value), major.value >= AMPERE)


def _torch_has_cuda() -> bool:
    """Return whether the build of torch that is installed has CUDA, by its file of versions."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        table = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    except OSError:
        return False
    return table.get("cuda") is not None
