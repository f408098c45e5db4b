"""What the routers of a mixture of experts say in a forward pass.

transformers names the modules of each architecture that give router logits; hooks on them keep the
logits of a pass, in the fused forward and in transformers' own. Which tokens of the pass are real
is known where rows are packed (`models/trunk.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import MODEL_MAPPING

from quartet.algorithms.load_balancing import Routing
from quartet.models.protocols import Trunk
from quartet.tensors import Float, Tensor

BALANCED = {
    "ernie4_5_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
}
"""The architectures whose load-balancing loss was compared with that of transformers
(`tests/models/test_routing.py`). For others transformers has none, or one of another kind."""


@dataclass
class Recorder:
    """Collects what the routers of a model say inside `recorded_routing`."""

    chosen: int = 0
    logits: list[Float[Tensor, "N E"]] = field(default_factory=list)
    counts: Float[Tensor, "N"] | None = None

    def begin(self, counts: Float[Tensor, "N"]) -> None:
        """Begin a pass over N tokens, of which each counts so often. What came before is dropped:
        at its first use, a model is compared with another way to compute it."""
        self.logits.clear()
        self.counts = counts

    @property
    def routing(self) -> Routing | None:
        """What the routers said in the last pass; None without a pass, and without routers."""
        if self.counts is None or not self.logits:
            return None
        return Routing(tuple(self.logits), self.chosen, self.counts)


_RECORDERS: "WeakKeyDictionary[Any, Recorder]" = WeakKeyDictionary()


@contextmanager
def recorded_routing(trunk: Trunk) -> Iterator[Recorder]:
    """Record what the routers of a trunk say in a pass inside the context. Nothing is recorded if
    gradients are off where it begins, in compiled blocks, and of models that `why_not_balanced`
    names."""
    recorder = Recorder()
    config: Any = getattr(trunk, "config", None)
    if not torch.is_grad_enabled() or why_not_balanced(config) is not None or _is_compiled(trunk):
        yield recorder
        return
    text = config.get_text_config()
    spec = _recordable(text)["router_logits"]
    recorder.chosen = text.num_experts_per_tok
    hooks = [
        module.register_forward_hook(partial(_keep, recorder, spec.index))
        for name, module in trunk.named_modules()
        if isinstance(module, spec.target_class) and _is_named(name, spec.layer_name)
    ]
    _RECORDERS[trunk] = recorder
    try:
        yield recorder
    finally:
        del _RECORDERS[trunk]
        for hook in hooks:
            hook.remove()


def recorder_of(trunk: Trunk) -> Recorder | None:
    """Return what records the passes of a trunk now; None if nothing does."""
    return _RECORDERS.get(trunk)


def why_not_balanced(config: Any) -> str | None:
    """Return why the load of a model's experts is not balanced, as the end of a sentence; None
    where it is."""
    text: Any = None if config is None else config.get_text_config()
    if getattr(text, "model_type", None) not in BALANCED:
        kind = getattr(text, "model_type", "the model")
        return f"{kind} is none of the mixtures of experts whose load Quartet balances"
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    if experts < 2:
        return f"this {text.model_type} has no experts"
    if "router_logits" not in _recordable(text):
        return (
            f"transformers {transformers.__version__} does not say what the routers of "
            f"{text.model_type} give, as newer releases do"
        )
    return None


def _recordable(text: Any) -> Mapping[str, Any]:
    """Return which outputs of modules inside transformers names for a text model's class."""
    recordable: Mapping[str, Any] = MODEL_MAPPING[type(text)]._can_record_outputs or {}
    return recordable


def _is_compiled(trunk: Trunk) -> bool:
    return any(hasattr(module, "fused_layer") for module in trunk.modules())


def _is_named(name: str, wanted: str | None) -> bool:
    """Return whether the dotted name of a module contains the wanted one, where one is wanted: an
    architecture's routers may be of a class that has other uses."""
    return wanted is None or f".{wanted.strip('.')}." in f".{name}."


def _keep(recorder: Recorder, index: int, _: Any, __: Any, output: Any) -> None:
    """Keep the router logits among the outputs of a module."""
    logits = output[index] if isinstance(output, tuple) else output
    recorder.logits.append(logits.flatten(0, -2))
