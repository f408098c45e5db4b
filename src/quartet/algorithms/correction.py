"""Weights for rollouts that another engine, or an older policy, sampled.

w_t = π_old(token t) / μ(token t), where μ is what the sampler says it drew from
(`rollout_logprobs`) and π_old what the learner computes for the same weights. They multiply the
policy loss and carry no gradient; tokens that are masked out still count in the denominator. Where
sampler and learner are one, every weight is 1.

A run whose responses come from servers has a correction unless its file says otherwise
(`for_another_engine`): another engine computes other log-probs from the same weights.
"""

from typing import Literal

from quartet.algorithms.masked import masked
from quartet.algorithms.ratios import SequenceRatio, held_exp, log_sequence_ratio, token_ratio
from quartet.parts import Family, Field
from quartet.tensors import Bool, Float, Tensor


class Correction(Family):
    """Weights of tokens that another engine or older weights have sampled."""

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"] | None:
        """Return the weight of each token's policy loss; None where every weight is 1."""
        raise NotImplementedError


def sequence_weight(
    old_logprobs: Float[Tensor, "B T"],
    rollout_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ratio: SequenceRatio,
) -> Float[Tensor, "B 1"]:
    """Return each response's weight, its log held within ±20."""
    return held_exp(log_sequence_ratio(old_logprobs - rollout_logprobs, mask, ratio))


class NoCorrection(Correction):
    """The sampler's log-probs are not consulted."""

    type: Literal["none"] = "none"

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> None:
        return None


class Truncated(Correction):
    """min(w_t, cap) (TIS, Yao et al. 2025; after Espeholt et al. 2018), and not below `floor`.
    w = (0.5, 3), cap = 2: (0.5, 2); floor = 0.8: (0.8, 2)."""

    type: Literal["truncated"] = "truncated"
    cap: float = Field(
        default=2.0,
        ge=1,
        description="The largest weight of a token, ≥ 1. Typical: 2.",
    )
    floor: float = Field(
        default=0.0, ge=0, le=1, description="The least weight; 0 leaves small ones as they are."
    )

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        return masked(token_ratio(old_logprobs, rollout_logprobs).clamp(self.floor, self.cap), mask)


class SequenceTruncated(Correction):
    """min((Π_s w_s)^{1/|o|}, cap) at every token of a response: the weight of π_old to the sampler
    as GSPO takes ratios of responses (Zheng et al. 2025, eq. 7). Times GSPO's own ratio it is that
    of π to the sampler. Weights (4, 0.25, 8): 8^(1/3) = 2; (0.5, 0.5): 0.5 twice.

    With `ratio = "product"` it is min(Π_s w_s, cap), the weight of the response's probability
    (veRL's truncated weights of sequences). Weights (0.5, 0.5): 0.25 twice."""

    type: Literal["sequence_truncated"] = "sequence_truncated"
    cap: float = Field(
        default=2.0,
        ge=1,
        description="The largest weight of a response, ≥ 1. Typical: 2.",
    )
    ratio: SequenceRatio = Field(
        default="geometric_mean",
        description="How a response's weight follows from its tokens': their geometric "
        "mean, which does not depend on the length, or their product.",
    )

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        weight = sequence_weight(old_logprobs, rollout_logprobs, mask, self.ratio)
        return masked(weight.clamp(max=self.cap).expand(mask.shape), mask)


class Masked(Correction):
    """w_t where low ≤ w_t ≤ high, else 0 (IcePop, 2025). w = (0.4, 1.2, 6), 0.5 to 5: (0, 1.2,
    0)."""

    type: Literal["masked"] = "masked"
    low: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The least weight of a token that is learnt from, from 0 to 1. Typical: 0.5.",
    )
    high: float = Field(
        default=5.0,
        ge=1,
        description="The largest weight of a token that is learnt from, ≥ 1. Typical: 5.",
    )

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        weight = token_ratio(old_logprobs, rollout_logprobs)
        return masked(weight, mask & (weight >= self.low) & (weight <= self.high))


class SequenceMasked(Correction):
    """Π_s w_s at every token of responses where low ≤ Π_s w_s ≤ high, 0 at every token of the
    others. Weights (2, 1.2): 2.4 twice; (2, 2) with high = 3: 0 twice.

    With `ratio = "geometric_mean"`, (Π_s w_s)^{1/|o|} is weight and criterion. With
    `weight = "token"` the tokens of responses that are kept have their own weights. Both together
    are the sequence filter of OpenRLHF: weights (2, 1.2) are (2, 1.2), as √2.4 = 1.55 is at most 3.
    """

    type: Literal["sequence_masked"] = "sequence_masked"
    low: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The least weight of a response that is learnt from, from 0 to 1. "
        "Typical: 0, which is no bound.",
    )
    high: float = Field(
        default=3.0,
        ge=1,
        description="The largest weight of a response that is learnt from, ≥ 1. Typical: 3.",
    )
    ratio: SequenceRatio = Field(
        default="product",
        description="How a response's weight follows from its tokens': their geometric "
        "mean, which does not depend on the length, or their product.",
    )
    weight: Literal["response", "token"] = Field(
        default="response",
        description="The weight of the tokens of a kept response: the response's, or their own.",
    )

    def __call__(
        self,
        old_logprobs: Float[Tensor, "B T"],
        rollout_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        of_response = sequence_weight(old_logprobs, rollout_logprobs, mask, self.ratio)
        inside = (of_response >= self.low) & (of_response <= self.high)
        weight = (
            of_response.expand(mask.shape)
            if self.weight == "response"
            else token_ratio(old_logprobs, rollout_logprobs)
        )
        return masked(weight, mask & inside)


OF_RESPONSES: frozenset[str] = frozenset({"sequence_clip", "gmpo"})
"""The policy losses, by type, whose ratio is that of a whole response."""


def for_another_engine(policy_loss: str, ratio: SequenceRatio | None = None) -> Correction:
    """Return the correction that a run with servers has where its file names none, given the type
    of its policy loss and that loss's `ratio` where it has one.

    It is `SequenceTruncated`, with the same ratio, for the losses whose ratio is that of a
    response, and `Truncated` for all others (Yao et al. 2025), at their default caps. That suits
    trust regions too: their surrogate is an expectation over the policy that sampled (Schulman et
    al. 2015, section 5).
    """
    if policy_loss not in OF_RESPONSES:
        return Truncated()
    return SequenceTruncated(ratio=ratio or "geometric_mean")
