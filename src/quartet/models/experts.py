"""Mixtures of experts: MLPs in which a router sends each token to a few of many experts.

The forward of such an MLP is transformers' own, which sorts tokens by expert and multiplies them in
one grouped product. Its experts are tensors [experts, out, in] and no linear layers: an optimizer
trains them, and adapters and 4-bit weights, which take the place of linear layers, leave them as
they are.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import grouped_mm

from quartet.models.architectures import Architecture
from quartet.models.elementwise import gated
from quartet.models.precision import read_as_held
from quartet.models.protocols import CausalModel
from quartet.tensors import Float, Int, Tensor


def has_experts(mlp: Any, row: Architecture) -> bool:
    """Return whether an MLP of this architecture is a mixture of experts."""
    return row.experts is not None and hasattr(mlp, row.experts)


def holds_experts(model: CausalModel) -> bool:
    """Return whether a model, of any architecture, has such MLPs."""
    return any(name.endswith(".experts") for name, _ in model.base_model.named_modules())


def expert_mlp(mlp: Any, x: Float[Tensor, "N H"]) -> Float[Tensor, "N H"]:
    """Return the output of such an MLP: the sum of the outputs of each token's experts, times the
    router's weights."""
    output: Tensor = mlp(x[None])
    return output[0]


def held_mlp(mlp: Any) -> Any:
    """Return the MLP with its weights as it reads them now, for many tokens without gradients.

    A weight that is trained in float32 is rounded once, and not for every token; others share
    memory with the MLP. On a GPU in bfloat16, where a decoder's time is that of its many small
    kernels, the experts are computed by `grouped_experts`.
    """
    weights = {
        id(p): nn.Parameter(getattr(module, name).detach(), requires_grad=False)
        for module in mlp.modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    held = copy.deepcopy(mlp, weights)
    read_as_held(held)
    weight = held.experts.down_proj
    if has_grouped_product(weight.device, weight.dtype):
        numbers = torch.arange(len(weight), device=weight.device)
        held.experts.forward = partial(grouped_experts, held.experts, numbers)
    return held


def has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's grouped product is made for weights of this kind: bfloat16 on GPUs of
    NVIDIA from Ampere on. For others transformers chooses another way."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def grouped_experts(
    experts: Any,
    numbers: Int[Tensor, "E"],
    x: Float[Tensor, "N H"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
) -> Float[Tensor, "N H"]:
    """Return the sum of the outputs of each token's experts times their weights, in fewer kernels
    than transformers' own forward. `numbers` are those of the experts, 0 to E − 1."""
    sorted_experts, order = chosen.flatten().sort()
    ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    inputs = x.index_select(0, order // chosen.shape[1])
    up = grouped_mm(inputs, experts.gate_up_proj.transpose(1, 2), offs=ends)
    gate, linear_up = up.chunk(2, dim=-1)
    inner = gated(gate, linear_up, experts.act_fn)
    by_expert = grouped_mm(inner, experts.down_proj.transpose(1, 2), offs=ends)
    by_token = torch.empty_like(by_expert).index_copy_(0, order, by_expert)
    return torch.bmm(weights[:, None].to(x.dtype), by_token.unflatten(0, chosen.shape))[:, 0]
