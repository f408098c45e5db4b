"""The one shift, and log-probabilities of tokens.

A causal model's output at position t speaks of token t + 1. `speak_of_own_token` is the only place in Quartet that moves
it there; everything else may rely on entry t speaking of token t.
"""

from typing import Any

import torch

from quartet.algorithms.kl import exact_kl
from quartet.tensors import Float, Int, Tensor


def speak_of_own_token(outputs: Float[Tensor, "B outputs"], width: int) -> Float[Tensor, "B {width}"]:
    """Outputs of the positions just before the last tokens of a row, moved under the tokens they speak of.

    `outputs[:, i]` was computed at the position before token `width - outputs + i`. Entries before those are 0.
    """
    return torch.nn.functional.pad(outputs, (width - outputs.shape[1], 0))


def token_logprobs(logits: Float[Tensor, "B n V"], tokens: Int[Tensor, "B n"], temperature: float) -> Float[Tensor, "B n"]:
    """log softmax(logits / temperature) of the given tokens, in float32. The temperature belongs to the policy: what is
    trained is the distribution that was sampled."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "B n V"], temperature: float) -> Float[Tensor, "B n"]:
    """−Σ p log p of softmax(logits / temperature), in nats: log V when all are equal, 0 when one is certain."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


class _ExactKL(torch.autograd.Function):
    """KL(softmax(logits / T) ‖ softmax(ref_logits / T)) with ∂KL/∂logit_v = π_v (log π_v − log π_ref,v − KL) / T. A chunk of
    positions at a time, forwards and backwards: log-probs of the whole vocabulary are never kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, temperature: float, chunk: int) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        ctx.temperature, ctx.chunk = temperature, chunk
        kl = [exact_kl(*_both_logprobs(a, b, temperature)) for a, b in _chunks(logits, ref_logits, chunk)]
        return torch.cat(kl).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        logits, ref_logits = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        flat, outer = gradient.view(-1, logits.shape[-1]), grads[0].reshape(-1, 1).split(ctx.chunk)
        for i, (a, b) in enumerate(_chunks(logits, ref_logits, ctx.chunk)):
            logprobs, ref = _both_logprobs(a, b, ctx.temperature)
            inner = logprobs.exp() * (logprobs - ref - exact_kl(logprobs, ref)[:, None]) / ctx.temperature
            flat[i * ctx.chunk : i * ctx.chunk + len(a)] = outer[i] * inner
        return gradient, None, None, None


def token_exact_kl(
    logits: Float[Tensor, "B n V"], ref_logits: Float[Tensor, "B n V"], temperature: float, chunk: int = 1024
) -> Float[Tensor, "B n"]:
    """KL(π ‖ π_ref) of every position's distribution, temperature included, differentiable in `logits`."""
    kl: Tensor = _ExactKL.apply(logits, ref_logits, temperature, chunk)
    return kl


def _chunks(logits: Tensor, ref_logits: Tensor, chunk: int) -> Any:
    vocabulary = logits.shape[-1]
    return zip(logits.reshape(-1, vocabulary).split(chunk), ref_logits.reshape(-1, vocabulary).split(chunk), strict=True)


def _both_logprobs(logits: Tensor, ref_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(dtype) / temperature).log_softmax(-1), (ref_logits.to(dtype) / temperature).log_softmax(-1)
