"""Norms and gated activations that keep only what their gradients need."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from quartet.models.architectures import NormKind
from quartet.tensors import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean x² + ε) (Zhang & Sennrich 2019), keeping x and one number per token for

    dx = r (g w − x̂ · mean(g w x̂))    dw = Σ g x̂    with r = 1/√(mean x² + ε), x̂ = r x
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated, and r depends on x
            r = _inverse_rms(x, ctx.eps)
        normed = x * r
        d_weight = (grads[0] * normed).sum(dim=tuple(range(x.ndim - 1)))
        d_normed = grads[0] * weight
        along = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1) / x.shape[-1]
        return torch.addcmul(d_normed, normed, along, value=-1) * r, d_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if torch.is_grad_enabled():
        inverse: Tensor = (norm.square() / x.shape[-1] + eps).rsqrt()
    else:
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return inverse


def normed(norm: Any, x: Tensor, kind: NormKind = "rms") -> Tensor:
    """Return the norm of x, with the weights and the ε of a module.

    torch's RMSNorm is one kernel on a GPU and a dozen on a CPU, where this file's is used.
    """
    if kind == "layer":
        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if kind == "rms + 1":
        # Weights near 0 are added to 1 in float32, as transformers does.
        weight, eps = 1.0 + norm.weight.to(torch.promote_types(x.dtype, torch.float32)), norm.eps
    else:
        weight, eps = norm.weight, norm.variance_epsilon
    if x.device.type != "cpu" or x.dtype not in {torch.float32, torch.float64}:
        return rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)
    if not torch.is_grad_enabled():
        return (x * _inverse_rms(x, eps)).mul_(weight)
    normalized: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normalized


class HeldNorm:
    """The numbers of a norm as they are read, read once: its weight in the dtype that it computes
    in, with the 1 of "rms + 1" added."""

    def __init__(self, norm: Any, kind: NormKind) -> None:
        self.kind: NormKind = "layer" if kind == "layer" else "rms"
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        if kind == "rms + 1":
            self.weight = 1.0 + norm.weight.to(
                torch.promote_types(norm.weight.dtype, torch.float32)
            )
        self.eps = norm.variance_epsilon if kind == "rms" else norm.eps
        self.variance_epsilon = self.eps

    def __call__(self, x: Tensor) -> Tensor:
        return normed(self, x, self.kind)


class _Gated(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020), keeping its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up, d_silu = silu(gate) * grads[0], grads[0] * up
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(d_silu, gate), d_up
        s = gate.sigmoid()  # this gradient will be differentiated, which torch's kernel cannot be
        return d_silu * s * (1 + gate * (1 - s)), d_up


class _GatedGelu(torch.autograd.Function):
    """gelu(gate) · up with the approximation of tanh, keeping its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = gelu(gate, approximate="tanh") * grads[0]
        return torch.ops.aten.gelu_backward(grads[0] * up, gate, approximate="tanh"), d_up


def gated(gate: Tensor, up: Tensor, activation: Any) -> Tensor:
    """Return activation(gate) · up."""
    if not torch.is_grad_enabled():
        activated: Tensor = activation(gate)
        return activated.mul_(up)
    product: Tensor
    name = type(activation).__name__
    if isinstance(activation, nn.SiLU) or name == "SiLUActivation":
        product = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    if name == "GELUTanh":
        product = _GatedGelu.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    product = activation(gate) * up
    return product
