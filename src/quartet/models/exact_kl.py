"""The exact KL of a policy from its reference at each position, Σ_v π(v) (log π(v) − log π_ref(v)),
from logits, or from hidden states.

From hidden states, both heads are computed a chunk of the vocabulary at a time. For 256 positions
and the vocabulary of Gemma 3, one tensor of all logits would take 268 MB, and seven are needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quartet.algorithms.kl import exact_kl
from quartet.models.logprobs import (
    PLAIN,
    Filter,
    HeadGradients,
    LogitShape,
    add_product,
    at_least_float32,
    chunk_columns,
    head_logits,
    logits_by_chunk,
)
from quartet.tensors import Float, Tensor


@dataclass(frozen=True)
class HeadInput:
    """What logits are computed from: f(h Wᵀ + b) at N positions, f being the shape of the
    logits."""

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, "V"] | None = None
    shape: LogitShape = PLAIN

    def logits(self) -> Float[Tensor, "N V"]:
        """Return all logits, in float32 at least."""
        return head_logits(self.hidden, self.weight, self.bias, self.shape)

    def chunks(
        self, temperature: float, columns: int, kept: Filter | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the first token of each chunk of the vocabulary and its logits / temperature."""
        return logits_by_chunk(
            self.hidden, self.weight, self.bias, temperature, columns, self.shape, kept
        )


def logits_exact_kl(
    logits: Float[Tensor, "N V"], ref_logits: Float[Tensor, "N V"], temperature: float
) -> Float[Tensor, "N"]:
    """Return the KL of softmax(logits / T) from softmax(ref_logits / T), differentiable in
    `logits`."""
    policy, reference = (
        (at_least_float32(x) / temperature).log_softmax(-1) for x in (logits, ref_logits)
    )
    return exact_kl(policy, reference)


def head_exact_kl(
    policy: HeadInput,
    reference: HeadInput,
    temperature: float,
    kept: Filter | None = None,
    columns: int | None = None,
) -> Float[Tensor, "N"]:
    """Return what `logits_exact_kl` returns, in float32, differentiable in the policy's hidden
    states, weight and bias. `kept` limits the policy, and not the reference, to the ids that a
    filter left. `columns` overrides the tokens of a chunk."""
    if not len(policy.hidden):
        return logits_exact_kl(policy.logits(), reference.logits(), temperature)
    columns = columns or chunk_columns(len(policy.hidden), policy.weight)
    kl: Tensor = _HeadExactKL.apply(  # type: ignore[no-untyped-call]
        policy.hidden,
        policy.weight,
        policy.bias,
        policy.shape,
        reference,
        temperature,
        kept,
        columns,
    )
    return kl


class _HeadExactKL(torch.autograd.Function):
    """With z and r the logits / T of policy and reference, and their difference d = z − r,

        KL = Σ π d − log Σ e^z + log Σ e^r    ∂KL / ∂z = π (d − Σ π d)    ∂z / ∂h = f′ W / T

    Sums are kept relative to Σ e^z so far. Where only hidden states learn, the gradient for them is
    Σ π d f′ W / T − (Σ π d) Σ π f′ W / T, two more sums of the same pass; else the logits are
    computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: LogitShape,
        reference: HeadInput,
        temperature: float,
        kept: Filter | None,
        columns: int,
    ) -> Tensor:
        policy = HeadInput(hidden, weight, bias, shape)
        on_hidden, on_weight, on_bias, *_ = ctx.needs_input_grad
        at_once = on_hidden and not on_weight and not on_bias
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = torch.zeros(len(hidden), 1, dtype=dtype, device=hidden.device)
        mean, normalizer, ref_normalizer = zeros, zeros - torch.inf, zeros - torch.inf
        # Σ π d f′ W in the first rows, Σ π f′ W below.
        sums = zeros.new_zeros(2 * len(hidden), hidden.shape[1]) if at_once else None
        for first, z, r in _both(policy, reference, temperature, kept, columns):
            ref_normalizer = torch.logaddexp(ref_normalizer, r.logsumexp(-1, keepdim=True))
            total = torch.logaddexp(normalizer, z.logsumexp(-1, keepdim=True))
            shrunk, normalizer = (normalizer - total).exp(), total
            d, slope = r.neg_().add_(z), shape.slope(z, temperature)
            p = z.sub_(normalizer).exp_()
            mean = mean * shrunk + torch.linalg.vecdot(p, d)[:, None]
            if sums is not None:
                p = p if slope is None else p.mul_(slope)
                sums.mul_(shrunk.repeat(2, 1))
                chunk = weight[first : first + p.shape[1]]
                add_product(sums, torch.cat([d.mul_(p), p]).to(weight.dtype), chunk)
        ctx.at_once = at_once
        if sums is not None:
            both, own = sums.chunk(2)
            gradient = (both - mean * own) * (shape.scale / temperature)
            ctx.save_for_backward(gradient.to(hidden.dtype))
        else:
            ctx.save_for_backward(hidden, weight, bias, mean, normalizer)
            ctx.given = shape, reference, temperature, kept, columns
        return (mean - normalizer + ref_normalizer)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outer = grads[0][:, None]
        nothing = (None,) * 5
        if ctx.at_once:
            (gradient,) = ctx.saved_tensors
            return gradient * outer.to(gradient.dtype), None, None, *nothing
        hidden, weight, bias, mean, normalizer = ctx.saved_tensors
        shape, reference, temperature, kept, columns = ctx.given
        policy = HeadInput(hidden, weight, bias, shape)
        found = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        factor = outer * (shape.scale / temperature)
        for first, z, r in _both(policy, reference, temperature, kept, columns):
            slope = shape.slope(z, temperature)
            d = r.neg_().add_(z).sub_(mean).mul_(factor)
            d = d.mul_(z.sub_(normalizer).exp_())
            d = (d if slope is None else d.mul_(slope)).to(weight.dtype)
            found.add(first, d)
        return *found.gradients(), *nothing


def _both(
    policy: HeadInput, reference: HeadInput, temperature: float, kept: Filter | None, columns: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the first token of each chunk, and the logits / T of policy and reference, which may be
    changed in place."""
    pairs = zip(
        policy.chunks(temperature, columns, kept),
        reference.chunks(temperature, columns),
        strict=True,
    )
    for (first, z), (_, r) in pairs:
        yield first, z, r
