"""Linear layers in 4 bits under adapters: QLoRA (Dettmers et al. 2023), by bitsandbytes.

NF4 cuts a weight matrix into blocks of 64 numbers. Each number is one of 16 quantiles of a normal
distribution times the largest magnitude in its block, and these magnitudes are kept in 8 bits.
That is 4.13 bits a weight. A forward pass puts a matrix together again in the dtype that the model
computes in, for one product, and so does the backward pass.
"""

import logging
from typing import Any

from torch import nn

from quartet.errors import QuartetError
from quartet.io.install import install_command
from quartet.models.experts import holds_experts
from quartet.models.protocols import CausalModel
from quartet.models.recurrent import is_read_by_weight
from quartet.tensors import Float, Tensor

# When it is imported, also by peft, it would say on the terminal that it looked for a faster kernel
# on the hub and lacks a package for that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class QuantizeError(QuartetError, ValueError):
    """A model that cannot be held in 4 bits; the message is one sentence."""


def bitsandbytes() -> Any:
    """Return the package. Raises QuantizeError without it."""
    try:
        import bitsandbytes
    except ImportError:
        raise QuantizeError(
            f"policy.quantize needs the package bitsandbytes: {install_command('quantize')}."
        ) from None
    return bitsandbytes


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is held in 4 bits.

    Until `store` is called, its weight has the layer's shape, no memory, and the dtype that the
    layer will compute in.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """`linear` is a layer without memory (`models/loading.py`)."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.quant_state: Any = None

    def store(self, weight: Float[Tensor, "out in"]) -> None:
        """Take this weight, rounded to 4 bits, on its device."""
        packed, self.quant_state = bitsandbytes().functional.quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.quant_state.dtype = self.weight.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dequantized(self) -> Float[Tensor, "out in"]:
        """Return the weight that the layer computes with."""
        weight: Tensor = bitsandbytes().functional.dequantize_4bit(self.weight, self.quant_state)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = bitsandbytes().matmul_4bit(
            x, self.weight, quant_state=self.quant_state, bias=bias
        )
        return product

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the scales of the blocks with the weight."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.quant_state is not None:
            self.quant_state.to(self.weight.device)
        return self


def quantize(model: CausalModel) -> Any:
    """Replace the linear layers in the blocks of a skeleton by such in 4 bits, and return it. The
    embeddings and the head stay in the dtype that the model computes in."""
    bitsandbytes()
    if holds_experts(model):
        raise QuantizeError(
            f'policy.quantize = "nf4": the experts of {model.config.model_type}, nearly all of its '
            "weights, are no linear layers and would stay as they are. Leave it out."
        )
    blocks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    replaced = 0
    for module in [m for block in blocks for m in block.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear and not is_read_by_weight(module, name):
                setattr(module, name, NF4Linear(child))
                replaced += 1
    if not replaced:
        raise QuantizeError(
            f'policy.quantize = "nf4": {model.config.model_type} has no linear layers in its '
            "blocks that could be held in 4 bits. Leave it out."
        )
    return model
