"""The one shift, and log-probabilities of tokens.

A causal model's output at position t speaks of token t + 1. `speak_of_own_token` is the only place in Quartet that moves
it there; everything else may rely on entry t speaking of token t.
"""

import torch

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
