"""Ratios of probabilities, π / π_old of a token or of a response, from log-probs.

Their logs are held within ±`MAX_LOG_RATIO`: exp of more does not fit where it is multiplied.
"""

from typing import Literal

from quartet.algorithms.masked import masked
from quartet.tensors import Bool, Float, Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within ± this, where exp still fits in float32."""

SequenceRatio = Literal["geometric_mean", "product"]
"""The ratio of a whole response: (Π_t ρ_t)^{1/|o|} (GSPO), or Π_t ρ_t, the ratio of the response's
probabilities (RLOO with several updates from one batch)."""


def held_exp(log_ratios: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return exp of log-ratios that are held within ±20. Beyond there is no gradient."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def token_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """ρ_t = π(token t) / π_old(token t), its log held within ±20. A token beyond has no gradient,
    and counts as clipped (`Surrogate.is_held`)."""
    return held_exp(logprobs - old_logprobs)


def log_sequence_ratio(
    log_ratios: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ratio: SequenceRatio = "geometric_mean",
) -> Float[Tensor, "B 1"]:
    """Return the log of each response's ratio, from those of its tokens; 0 without tokens."""
    total = masked(log_ratios, mask).sum(dim=1, keepdim=True)
    return total if ratio == "product" else total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def sequence_ratio(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ratio: SequenceRatio = "geometric_mean",
) -> Float[Tensor, "B T"]:
    """The response's ratio s at every token; as GSPO-token has it, its value is the sequence's and
    its gradient the token's: s_t = sg[s] · π_t / sg[π_t] (Zheng et al. 2025, eq. 14).

    Ratios (2, 0.5, 2): exp((log 2 − log 2 + log 2) / 3) = 2^(1/3) = 1.26; their product is 2. The
    log is held within ±20.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    of_response = log_sequence_ratio(log_ratio, mask, ratio).detach()
    return held_exp(of_response + log_ratio - log_ratio.detach())
