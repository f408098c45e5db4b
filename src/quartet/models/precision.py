"""The precision that a model computes in: float32, or bfloat16 with float32 master weights.

bfloat16 has 8 significant bits. At a learning rate of 1e-6 an optimizer step is smaller than half
of the last bit of most weights, so that weights kept in bfloat16 would hardly move. What is trained
therefore stays in float32: the parameters, their gradients, and Adam's moments (mixed precision
with master weights, Micikevicius et al. 2018). `compute_in` has every module read such a parameter
rounded to the compute dtype; autograd brings its gradient back to float32, where the gradients of
micro-batches add up. Parameters that are not trained are held in the compute dtype.

Products of weights and hidden states are in bfloat16; logits, log-probs, entropies, values, losses
and all statistics are in float32 (`models/logprobs.py`, `models/heads.py`). `torch.autocast` is not
used. It would choose a dtype for each operation by its own list: the head that computes its logits
again for the gradient would multiply in bfloat16 where this library wants float32, and the decoder,
which has functions of its own, would round at other places than training does.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn

from quartet.distributed.sharding import is_sharded
from quartet.tensors import Tensor

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def best_precision(device: torch.device) -> Precision:
    """Return bf16 on a GPU that computes in it, and fp32 elsewhere. A CPU can compute in bf16, too,
    but most are slower at it."""
    if device.type == "cuda":
        return "bf16" if has_bf16() else "fp32"
    if device.type == "mps":
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp32"
    return "fp32"


def dtype_of(precision: Precision | Literal["auto"], device: torch.device) -> torch.dtype:
    """Return the dtype that models compute in, and that frozen ones are held in; "auto" is the best
    one of the device."""
    return DTYPES[best_precision(device) if precision == "auto" else precision]


def has_bf16() -> bool:
    """Return whether the CUDA device in use computes in bf16. GPUs of NVIDIA before Ampere (V100,
    T4) only convert such numbers, and flash attention does not run there."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def compute_in(model: Any, dtype: torch.dtype, head: Any = None) -> Any:
    """Have a model compute in this dtype, and return it.

    Trained parameters stay as they are and are rounded whenever a module reads them; the others are
    converted. `head`, a linear layer of the model to its labels, stays in float32, and so do the
    numbers that it returns. The function can be called again, after adapters were added or
    parameters frozen. Modules whose parameters are sharded are left as they are: FSDP rounds what
    it gathers, and has references to the parts that it holds.
    """
    if head is not None and not head._forward_pre_hooks:
        keep_in_float32(head.parameters())
        head.register_forward_pre_hook(_in_float32)
    for module in model.modules():
        if module is head or any(map(is_sharded, module.parameters(recurse=False))):
            continue
        floating = {
            name: p for name, p in module._parameters.items() if p is not None and _rounds(p, dtype)
        }
        for p in floating.values():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        _read_in(module, dtype, [name for name, p in floating.items() if p.requires_grad])
    return model


def read_as_held(module: Any) -> None:
    """Undo `compute_in` for reads: modules inside this one give their parameters as they are. FSDP
    rounds what it gathers itself, and must find its own parameters where it put them."""
    for each in module.modules():
        if getattr(type(each), "_rounded_names", ()):
            each.__class__ = type(each)._plain_class


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype that a language model computes in."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def label_layer(classifier: Any) -> Any:
    """Return the linear layer of a sequence or token classifier that gives its labels; None where
    its architecture has none."""
    layers = [
        module
        for module in classifier.modules()
        if isinstance(module, nn.Linear) and module.out_features == classifier.config.num_labels
    ]
    return layers[-1] if layers else None


def keep_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Convert parameters to float32, in place."""
    for p in parameters:
        if _rounds(p, torch.float32):
            p.data = p.data.to(torch.float32)


def _rounds(p: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a parameter has a floating-point dtype other than this one. float64 is left
    alone: only tests use it, and they want it."""
    return p.is_floating_point() and p.dtype not in {dtype, torch.float64}


def _read_in(module: Any, dtype: torch.dtype, names: list[str]) -> None:
    """Have reads of `module.<name>` return the parameter in this dtype."""
    kind: type = type(module)
    before: tuple[str, ...] = getattr(kind, "_rounded_names", ())
    if names or before:
        module._compute_dtype = dtype
    if set(names) - set(before):
        plain: type = getattr(kind, "_plain_class", kind)
        module.__class__ = _rounding_class(plain, tuple(sorted({*names, *before})))


@cache
def _rounding_class(kind: type, names: tuple[str, ...]) -> type:
    """Return a subclass of a module's class in which these parameters are read in the module's
    compute dtype. (Properties belong to classes, not to objects.)"""
    body: dict[str, Any] = {name: property(partial(_rounded, name=name)) for name in names}
    body |= {"_rounded_names": names, "_plain_class": kind, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def _in_float32(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs of a layer, those in bfloat16 as float32."""
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in inputs)


def _rounded(module: Any, name: str) -> Any:
    parameter = module._parameters[name]
    return None if parameter is None else parameter.to(module._compute_dtype)
