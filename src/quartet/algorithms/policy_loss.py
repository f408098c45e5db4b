"""Policy losses: the loss per token that moves the policy. Notation: ρ_t = π(token t) / π_old(token
t)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quartet.algorithms.kl import k3
from quartet.algorithms.masked import masked
from quartet.algorithms.ratios import (
    MAX_LOG_RATIO,
    SequenceRatio,
    held_exp,
    log_sequence_ratio,
    sequence_ratio,
    token_ratio,
)
from quartet.parts import Family, Field, OrInf
from quartet.tensors import Bool, Float, Tensor, torch

BELOW = "Ratios below 1 − low are clipped."
ABOVE = "Ratios above 1 + high are clipped."


def clip_surrogate(
    ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], low: float, high: float
) -> Float[Tensor, "B T"]:
    """Return −min(ρ A, clip(ρ, 1 − low, 1 + high) A) (Schulman et al. 2017, eq. 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def outside(
    ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], low: float, high: float
) -> Bool[Tensor, "B T"]:
    """Return where `clip_surrogate` has no gradient: the ratio has left the range in the direction
    in which the advantage pushes it."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


@dataclass(frozen=True)
class Surrogate:
    """What a policy loss is computed from, for each token of some responses. All are [B T]; entry t
    is of token t."""

    logprobs: Float[Tensor, "B T"]
    """log π(token t), with a gradient."""
    old_logprobs: Float[Tensor, "B T"]
    """log π_old(token t): of the policy that sampled."""
    advantages: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    """True at the response's tokens. Elsewhere everything above is 0, and a loss may hold anything;
    it is not counted there."""

    @property
    def ratio(self) -> Float[Tensor, "B T"]:
        """Return ρ_t, see `token_ratio`."""
        return token_ratio(self.logprobs, self.old_logprobs)

    @property
    def is_held(self) -> Bool[Tensor, "B T"]:
        """Return where ρ_t is held at e^±20, so that it has no gradient."""
        return (self.logprobs - self.old_logprobs).abs() > MAX_LOG_RATIO


@dataclass(frozen=True)
class ClipRange:
    """Over which ratios a policy loss keeps the gradient. It goes into the record of a run, for the
    readers that say of each token what the clip did."""

    low: float = 0.0
    """A token with A < 0 loses its gradient below this ratio."""
    high: float = math.inf
    """A token with A > 0 loses its gradient above this ratio."""
    cap: float = math.inf
    """A token with A < 0 loses its gradient above this ratio, too: the dual clip."""
    of_response: bool = False
    """Whether the ratio is that of the whole response, and not each token's own."""


class PolicyLoss(Family):
    """The loss that moves the policy: one number per token, to be minimised.

    A subclass implements `__call__`. Where it takes the gradient of some tokens away it also says
    where, in `clipped`, and over which ratios, in `clip_range`: the clip fraction, the inspector
    and the doctor read them.
    """

    @property
    def needs_step_kl(self) -> bool:
        """Whether `adapt` reads the KL that a step has caused, the metric `policy/step_kl`."""
        return False

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        """Return the loss of each token."""
        raise NotImplementedError

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        """Return the tokens whose gradient the loss has taken away; by default none."""
        return torch.zeros_like(tokens.mask)

    @property
    def clip_range(self) -> ClipRange | None:
        """The ratios between which tokens keep their gradient; None, the default, where no two
        bounds say it. Readers then say only what `clipped` said of each token."""
        return None

    def adapt(self, metrics: Mapping[str, float]) -> "PolicyLoss":
        """Return the loss of the next step, after a step with these metrics; by default itself."""
        return self


class Reinforce(PolicyLoss):
    """ℓ_t = −A_t log π(token t) (Williams 1992): the first rungs of the ladder. With the return for
    an advantage it is −V log π; with a critic's advantage, the actor's loss of A2C."""

    type: Literal["reinforce"] = "reinforce"

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return -tokens.advantages * tokens.logprobs


class ImportanceWeighted(PolicyLoss):
    """ℓ_t = −ρ_t A_t: several updates from one batch, and nothing that keeps them near it (Schulman
    et al. 2017, eq. 6). ρ = 1.5, A = 2: −3."""

    type: Literal["importance_weighted"] = "importance_weighted"

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return -tokens.ratio * tokens.advantages

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        return tokens.is_held


class KLPenalty(PolicyLoss):
    """ℓ_t = −ρ_t A_t + β KL(π_old ‖ π) (Schulman et al. 2017, eq. 8 and section 4). The KL of the
    sampled token is ρ − 1 − log ρ, whose expectation under π_old, and whose gradient's, are the
    KL's.

    After a step whose KL per token, measured when the step is over, is above 1.5 δ, β doubles;
    below δ / 1.5, it halves. A step in which only the critic learnt says nothing. δ = 0 keeps β
    fixed. ρ = 1.5, A = 2, β = 1: −3 + (0.5 − 0.405) = −2.905.
    """

    type: Literal["kl_penalty"] = "kl_penalty"
    beta: float = Field(
        default=1.0, ge=0, description="The weight of KL(π_old ‖ π): the controller's state."
    )
    target: float = Field(
        default=0.01,
        ge=0,
        description="δ, the KL per token of one step to aim at; 0 keeps beta fixed.",
    )

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return -tokens.ratio * tokens.advantages + self.beta * k3(
            tokens.old_logprobs, tokens.logprobs
        )

    @property
    def needs_step_kl(self) -> bool:
        return self.target > 0

    def coefficients(self) -> dict[str, float]:
        return {"policy/beta": self.beta}

    def adapt(self, metrics: Mapping[str, float]) -> "PolicyLoss":
        kl = metrics.get("policy/step_kl")
        if self.target == 0 or kl is None or self.target / 1.5 <= kl <= 1.5 * self.target:
            return self
        return dataclasses.replace(self, beta=self.beta * (2.0 if kl > self.target else 0.5))


class Clip(PolicyLoss):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised:

        ℓ_t = −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t)

    No gradient flows where A > 0 and ρ > 1 + high, or A < 0 and ρ < 1 − low: the update has gone
    far enough that way. With ρ = 1.5, A = 2 and high = 0.2: −min(3, 2.4) = −2.4, and no gradient. A
    `high` above `low` lets unlikely tokens grow ("clip-higher", DAPO: 0.2 and 0.28).
    """

    type: Literal["clip"] = "clip"
    low: float = Field(default=0.2, gt=0, lt=1, description=f"{BELOW} Typical: 0.1 to 0.3.")
    high: OrInf = Field(default=0.2, gt=0, description=f"{ABOVE} Typical: 0.1 to 0.3.")

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return clip_surrogate(tokens.ratio, tokens.advantages, self.low, self.high)

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        return outside(tokens.ratio, tokens.advantages, self.low, self.high) | tokens.is_held

    @property
    def clip_range(self) -> ClipRange:
        return ClipRange(1 - self.low, 1 + self.high)


class DualClip(PolicyLoss):
    """Clip, and for A < 0 no loss above −cap · A (Ye et al. 2020): one token whose ratio exploded
    cannot drive the update.

    ρ = 10, A = −1, cap = 3: Clip says 10, this says min(10, 3) = 3, without a gradient. veRL has it
    always on.
    """

    type: Literal["dual_clip"] = "dual_clip"
    low: float = Field(default=0.2, gt=0, lt=1, description=f"{BELOW} Typical: 0.1 to 0.3.")
    high: OrInf = Field(default=0.2, gt=0, description=f"{ABOVE} Typical: 0.1 to 0.3.")
    cap: OrInf = Field(
        default=3.0, gt=1, description="The largest ratio that a token with A < 0 may count with."
    )

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        loss = clip_surrogate(tokens.ratio, tokens.advantages, self.low, self.high)
        return torch.where(
            tokens.advantages < 0, torch.minimum(loss, -self.cap * tokens.advantages), loss
        )

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        ratio = tokens.ratio
        is_capped = (tokens.advantages < 0) & (ratio > self.cap)
        return outside(ratio, tokens.advantages, self.low, self.high) | is_capped | tokens.is_held

    @property
    def clip_range(self) -> ClipRange:
        return ClipRange(1 - self.low, 1 + self.high, self.cap)


class SequenceClip(PolicyLoss):
    """GSPO (Zheng et al. 2025): the clip acts on the whole response's ratio s = exp(mean log ρ_t).

    Written per token in the form of GSPO-token, which has GSPO's value and gradient where a
    response has one advantage. The window is narrow because a mean of log-ratios moves little.

    With `ratio = "product"` s is the ratio of the response's probabilities, as RLOO with several
    updates from one batch takes it (TRL, with a window of 0.2): summed over a response's tokens
    (`fixed_length`, length 1) the gradient is that of −min(s A, clip(s) A).
    """

    type: Literal["sequence_clip"] = "sequence_clip"
    low: float = Field(default=3e-4, gt=0, lt=1, description=f"{BELOW} GSPO: 3e-4.")
    high: OrInf = Field(default=4e-4, gt=0, description=f"{ABOVE} GSPO: 4e-4.")
    ratio: SequenceRatio = Field(
        default="geometric_mean",
        description="The mean of a response's log-ratios, or their sum (product).",
    )

    def _ratio(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.mask, self.ratio)

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        return clip_surrogate(self._ratio(tokens), tokens.advantages, self.low, self.high)

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        log_ratios = tokens.logprobs - tokens.old_logprobs
        is_held = log_sequence_ratio(log_ratios, tokens.mask, self.ratio).abs() > MAX_LOG_RATIO
        return outside(self._ratio(tokens), tokens.advantages, self.low, self.high) | is_held

    @property
    def clip_range(self) -> ClipRange:
        return ClipRange(1 - self.low, 1 + self.high, of_response=True)


class Cispo(PolicyLoss):
    """ℓ_t = −sg[clip(ρ_t, ratio_min, ratio_max)] A_t log π(token t) (MiniMax-M1, 2025, eq. 4): the
    weight is cut, the gradient of every token stays. On the first step, where ρ = 1, it is
    REINFORCE.

    MiniMax-M1 leaves the lower bound open and does not print the upper one; 5 is what ScaleRL
    (Khatri et al. 2025) uses.
    """

    type: Literal["cispo"] = "cispo"
    ratio_min: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The least ratio π / π_old that weights a token, from 0 to 1; 0 is no "
        "bound. Typical: 0.",
    )
    ratio_max: OrInf = Field(
        default=5.0,
        gt=1,
        description="The largest ratio π / π_old that weights a token, > 1. Typical: 5.",
    )

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        weight = tokens.ratio.clamp(self.ratio_min, self.ratio_max).detach()
        return -weight * tokens.advantages * tokens.logprobs


class Sapo(PolicyLoss):
    """ℓ_t = −(4/τ) σ(τ (ρ_t − 1)) A_t (SAPO, Gao et al. 2025): a soft gate in place of the clip; τ
    is `positive` where A > 0, else `negative`. At ρ = 1 its gradient is that of −ρ A. ρ = 1.5, A =
    2, τ = 1: −4 · σ(0.5) · 2 = −4.98."""

    type: Literal["sapo"] = "sapo"
    positive: float = Field(
        default=1.0,
        gt=0,
        description="The temperature τ of the gate where the advantage is positive, > 0. "
        "Typical: 1.",
    )
    negative: float = Field(
        default=1.05,
        gt=0,
        description="The temperature τ of the gate where the advantage is negative, > 0; "
        "larger closes it sooner. Typical: 1.05.",
    )

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        ratio = tokens.ratio
        tau = torch.where(tokens.advantages > 0, self.positive, self.negative).to(ratio.dtype)
        return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * tokens.advantages


class Gmpo(PolicyLoss):
    """ℓ_t = −A_t (Π_s ρ̃_s)^{1/|o|} (GMPO, Zhao et al. 2025, algorithm 1): the geometric mean of
    the response's ratios, each cut in the log at +window where A > 0 and at −window where A < 0.

    A = 1, ratios (e^0.6, e^0.2), window 0.4: −exp((0.4 + 0.2) / 2) = −1.35.
    """

    type: Literal["gmpo"] = "gmpo"
    window: float = Field(
        default=0.4, gt=0, description="In the log: ratios are held within e^−window and e^window."
    )

    def __call__(self, tokens: Surrogate) -> Float[Tensor, "B T"]:
        log_ratio = masked(tokens.logprobs - tokens.old_logprobs, tokens.mask)
        advantages = masked(tokens.advantages, tokens.mask)
        kept = torch.where(
            advantages > 0,
            log_ratio.clamp(max=self.window),
            log_ratio.clamp(min=-self.window),
        )
        return -advantages * held_exp(log_sequence_ratio(kept, tokens.mask))

    def clipped(self, tokens: Surrogate) -> Bool[Tensor, "B T"]:
        log_ratio = tokens.logprobs - tokens.old_logprobs
        return torch.where(tokens.advantages > 0, log_ratio > self.window, log_ratio < -self.window)

    @property
    def clip_range(self) -> ClipRange:
        return ClipRange(math.exp(-self.window), math.exp(self.window))
