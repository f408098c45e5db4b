"""The one shift, and what the output head says of tokens.

A causal model's output at position t speaks of token t + 1. `speaking` is the only place in Quartet that
knows; everything else may rely on entry t speaking of token t.

The head is the largest product of a small model and its output the largest tensor: [positions, vocabulary]. It is asked
only at the positions that speak of tokens somebody wants to know about (N of them), and where the output would be large,
a chunk of positions at a time: `head_statistics` keeps log-probs and entropies, and computes a chunk's logits again for
its gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch

from quartet.algorithms.kl import exact_kl
from quartet.tensors import Bool, Float, Int, Tensor

CHUNK_ELEMENTS = 2**23
"""Logits that are alive at once: 32 MB in float32. Below that nothing is gained by computing them twice."""


def speaking(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The positions whose outputs speak of the masked tokens, in the same order: each is one before. The first token of a
    row has nobody to speak of it and may not be asked for."""
    return torch.nn.functional.pad(mask[:, 1:], (0, 1))


def under_own_token(values: Float[Tensor, "N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Numbers of the masked tokens, each under its own, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def token_logprobs(logits: Float[Tensor, "*n V"], tokens: Int[Tensor, "*n"], temperature: float) -> Float[Tensor, "*n"]:
    """log softmax(logits / temperature) of the given tokens, in float32. The temperature belongs to the policy: what is
    trained is the distribution that was sampled."""
    scaled = _float(logits) / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "*n V"], temperature: float) -> Float[Tensor, "*n"]:
    """−Σ p log p of softmax(logits / temperature), in nats: log V when all are equal, 0 when one is certain."""
    logprobs = (_float(logits) / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logits_statistics(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], temperature: float, entropy_gradient: bool = False
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """log-probs and entropies; the entropies carry a gradient only where it is asked for."""
    logprobs = token_logprobs(logits, tokens, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        return logprobs, token_entropy(logits, temperature)


# --- log-probs and entropy from hidden states ----------------------------------------------------------------------------


class _HeadStatistics(torch.autograd.Function):
    """log p(token) and H(p) of p = softmax((h Wᵀ + b) / T), with

        ∂ log p_y / ∂z = onehot(y) − p        ∂H / ∂z = −p (log p + H)        z = (h Wᵀ + b) / T

    A chunk of positions at a time, forwards and, from logits computed again, backwards."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, normalizer = ([] for _ in range(3))
        for h, y in zip(hidden.split(rows), tokens.split(rows), strict=True):
            z = _scaled_logits(h, weight, bias, temperature)
            log_sum = z.logsumexp(-1, keepdim=True)
            logprobs.append(z.gather(-1, y[:, None])[:, 0] - log_sum[:, 0])
            p = (z - log_sum).exp_()
            entropy.append(log_sum[:, 0] - p.mul_(z).sum(-1))
            normalizer.append(log_sum)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(normalizer), torch.cat(entropy))
        return torch.cat(logprobs), torch.cat(entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normalizer, entropy = ctx.saved_tensors
        asked = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if asked[0] else None
        d_weight = torch.zeros_like(weight, dtype=normalizer.dtype) if asked[1] else None
        d_bias = torch.zeros_like(bias, dtype=normalizer.dtype) if bias is not None and asked[2] else None
        on_entropy = bool(grads[1].count_nonzero())
        for start in range(0, len(hidden), ctx.rows):
            piece = slice(start, start + ctx.rows)
            h, g = hidden[piece], grads[0][piece, None]
            z = _scaled_logits(h, weight, bias, ctx.temperature)
            p = z.sub_(normalizer[piece]).exp()  # z is log p from here on
            d = p.mul_(-g - grads[1][piece, None] * (z + entropy[piece, None])) if on_entropy else p.mul_(-g)
            d.scatter_add_(1, tokens[piece, None], g)
            d /= ctx.temperature
            if d_hidden is not None:
                d_hidden[piece] = d.to(weight.dtype) @ weight
            if d_weight is not None:
                d_weight.addmm_(d.t(), h.to(d.dtype))
            if d_bias is not None:
                d_bias += d.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def head_statistics(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"] | None,
    tokens: Int[Tensor, "N"],
    temperature: float,
    entropy_gradient: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """log-probs of `tokens` and entropies of the distributions they were drawn from, in float32, without an [N, V] tensor. The
    entropies carry a gradient only where it is asked for."""
    if len(hidden) * len(weight) <= chunk_elements:
        return logits_statistics(torch.nn.functional.linear(hidden, weight, bias), tokens, temperature, entropy_gradient)
    rows = max(chunk_elements // len(weight), 1)
    logprobs, entropy = _HeadStatistics.apply(hidden, weight, bias, tokens, temperature, rows)
    return logprobs, entropy if entropy_gradient else entropy.detach()


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = _float(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1 else logits.div_(temperature)


# --- the exact KL from logits --------------------------------------------------------------------------------------------


class _ExactKL(torch.autograd.Function):
    """KL(softmax(logits / T) ‖ softmax(ref_logits / T)) with ∂KL/∂logit_v = π_v (log π_v − log π_ref,v − KL) / T. A chunk of
    positions at a time, forwards and backwards: log-probs of the whole vocabulary are never kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, temperature: float, chunk: int) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat([exact_kl(*_both_logprobs(a, b, temperature)) for a, b in _chunks(logits, ref_logits, chunk)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        logits, ref_logits = ctx.saved_tensors
        gradient, outer = torch.empty_like(logits), grads[0][:, None].split(ctx.chunk)
        for i, (a, b) in enumerate(_chunks(logits, ref_logits, ctx.chunk)):
            logprobs, ref = _both_logprobs(a, b, ctx.temperature)
            inner = logprobs.exp() * (logprobs - ref - exact_kl(logprobs, ref)[:, None]) / ctx.temperature
            gradient[i * ctx.chunk : i * ctx.chunk + len(a)] = outer[i] * inner
        return gradient, None, None, None


def token_exact_kl(
    logits: Float[Tensor, "N V"], ref_logits: Float[Tensor, "N V"], temperature: float, chunk: int = 1024
) -> Float[Tensor, "N"]:
    """KL(π ‖ π_ref) of every position's distribution, temperature included, differentiable in `logits`."""
    kl: Tensor = _ExactKL.apply(logits, ref_logits, temperature, chunk)
    return kl


def _chunks(logits: Tensor, ref_logits: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(logits.split(chunk), ref_logits.split(chunk), strict=True)


def _both_logprobs(logits: Tensor, ref_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (_float(logits) / temperature).log_softmax(-1), (_float(ref_logits) / temperature).log_softmax(-1)


def _float(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
