"""Mixtures of experts: MLPs in which a router sends each token to a few of many experts.

The forward of such an MLP is transformers' own, which sorts tokens by expert and multiplies them in
one grouped product. Its experts are tensors [experts, out, in] and no linear layers: an optimizer
trains them, and adapters and 4-bit weights, which take the place of linear layers, leave them as
they are. No loss balances the load of the experts.
"""

import copy
from typing import Any

from torch import nn

from quartet.models.architectures import Architecture
from quartet.models.precision import read_as_held
from quartet.models.protocols import CausalModel
from quartet.tensors import Float, Tensor


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
    memory with the MLP.
    """
    weights = {
        id(p): nn.Parameter(getattr(module, name).detach(), requires_grad=False)
        for module in mlp.modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    held = copy.deepcopy(mlp, weights)
    read_as_held(held)
    return held
