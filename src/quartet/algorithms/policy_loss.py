"""The surrogate that moves the policy, per token."""

from typing import Literal

from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Tensor, torch


def token_ratio(logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """ρ_t = π(token t) / π_old(token t). The log-ratio is held within ±20, where exp still fits in float32 and any
    clip has long since taken hold."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


@part
class Clip:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised:

        ℓ_t = −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t)

    No gradient flows where A > 0 and ρ > 1 + high, or A < 0 and ρ < 1 − low: the update has gone far enough that way.
    With ρ = 1.5, A = 2 and high = 0.2: −min(3, 2.4) = −2.4, and no gradient.
    """

    type: Literal["clip"] = "clip"
    low: float = Field(default=0.2, gt=0, lt=1, description="Ratios below 1 − low are clipped. Typical: 0.1 to 0.3.")
    high: float = Field(default=0.2, gt=0, description="Ratios above 1 + high are clipped. Typical: 0.1 to 0.3.")

    def __call__(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        ratio = token_ratio(logprobs, old_logprobs)
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)

    def clipped(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Bool[Tensor, "B T"]:
        """Where the clip took the gradient away."""
        ratio = token_ratio(logprobs, old_logprobs)
        return ((advantages > 0) & (ratio > 1 + self.high)) | ((advantages < 0) & (ratio < 1 - self.low))
