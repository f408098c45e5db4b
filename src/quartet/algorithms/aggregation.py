"""From a loss per token to a scalar.

The denominator is counted over everything that feeds one optimizer step and is handed to every
piece of it, so that micro-batches and ranks add up to the same gradient, however they were cut.
"""

from typing import Literal

from quartet.algorithms.masked import masked
from quartet.parts import Family, Field
from quartet.tensors import Bool, Float, Tensor


class Aggregation(Family):
    """How the losses of tokens become one number."""

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        """Return what everything that feeds an optimizer step is divided by."""
        raise NotImplementedError

    def __call__(
        self, loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: float
    ) -> Float[Tensor, ""]:
        """Return the share of these rows in the loss."""
        raise NotImplementedError


class TokenMean(Aggregation):
    """Σ ℓ_t / number of tokens: every token weighs the same, a long response more than a short
    one."""

    type: Literal["token_mean"] = "token_mean"

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return float(mask.sum())

    def __call__(
        self, loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: float
    ) -> Float[Tensor, ""]:
        return masked(loss, mask).sum() / max(denominator, 1)


class SequenceMean(Aggregation):
    """Σ_i (mean over the tokens of response i) / number of responses: every response weighs the
    same (GRPO).

    A response of no tokens counts neither above nor below the line.
    """

    type: Literal["sequence_mean"] = "sequence_mean"

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return float(mask.any(dim=1).sum())

    def __call__(
        self, loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: float
    ) -> Float[Tensor, ""]:
        return (masked(loss, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / max(
            denominator, 1
        )


class FixedLength(Aggregation):
    """Σ ℓ_t / (number of responses · length): a constant in place of the length, so that neither
    long nor short responses are favoured (Dr. GRPO, Liu et al. 2025). The paper takes the
    generation budget, max_new_tokens, for it."""

    type: Literal["fixed_length"] = "fixed_length"
    length: int = Field(
        default=1024, ge=1, description="The generation budget: set it to rollout.max_new_tokens."
    )

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return float(mask.any(dim=1).sum()) * self.length

    def __call__(
        self, loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: float
    ) -> Float[Tensor, ""]:
        return masked(loss, mask).sum() / max(denominator, 1)
