"""Models whose parameters have shapes and no memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def skeleton(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """Return the model of a transformers config, in evaluation mode. Its parameters are on torch's
    meta device; its buffers are real, since no file holds them."""
    with _parameters_without_memory():
        model = auto.from_config(config, dtype=torch.float32)
    return model.eval()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Have modules that this thread constructs inside the context put their parameters on the meta
    device as soon as they have them, before anything initializes them."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta and threading.get_ident() == thread:
            p = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        register(module, name, p)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
