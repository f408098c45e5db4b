"""Measurements that may fail, or be cut off: the others are kept."""

import contextlib
import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Numbers = dict[str, Any]


def attempt(work: Callable[..., Numbers], *given: Any) -> Numbers:
    """Return what a work measured, or how it failed: the others are measured all the same, with
    the memory that this one has left. Where it failed is printed: a machine that is lent for
    minutes is gone before anyone can look again."""
    try:
        return work(*given)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()  # a model with activation checkpoints refers to itself
        with contextlib.suppress(RuntimeError):  # of a device that is lost
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Return whether the device refuses all work: after some errors CUDA does, in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def earlier(out: Path | None, device: str) -> Numbers:
    """Return what a command with the same --out has measured on this device, by its names."""
    if out is None or not out.is_file():
        return {"shapes": {}}
    results: Numbers = json.loads(out.read_text(encoding="utf-8"))
    if results["device"] != device:
        raise SystemExit(f"--out {out}: is of {results['device']}, and this is {device}.")
    return results
