"""The Kullback–Leibler divergence between two policies, and where an algorithm puts it: in the
reward, in the loss, or nowhere.

Estimators after Schulman 2020, "Approximating KL divergence". For a token x ~ π and the log-ratio d
= log π(x) − log π_ref(x), each says something of KL(π ‖ π_ref) of that token's distribution. Which
placement and which estimator reach the optimum of E[score] − coef · KL, and which do not, is
measured in docs/algorithms.md.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import model_validator

from quartet.algorithms.masked import masked, mean_of_others
from quartet.algorithms.ratios import held_exp
from quartet.experience import Batch
from quartet.parts import Family, Field
from quartet.tensors import Bool, Float, Int, Tensor, torch

Estimator = Literal["k1", "k2", "k3", "abs", "squared", "exact"]
COEF = "It multiplies a penalty; a negative value rewards leaving the reference model."


def k1(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """d. Unbiased, may be negative, high variance. For π = 0.5 and π_ref = 0.25: log 2 = 0.693."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """d² / 2. Biased as a value; as a loss on sampled tokens its gradient is that of the exact KL.
    For d = log 2: 0.240."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """exp(−d) − 1 + d. Unbiased, never negative, low variance. For d = log 2: 0.5 − 1 + 0.693 =
    0.193.

    It is not clamped: a clamp at 10, as some libraries have it, removes the gradient below π/π_ref
    = 0.074, exactly where it is needed.
    """
    difference = ref_logprobs - logprobs
    return difference.expm1() - difference


def absolute(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """|d|: veRL's "abs". No estimate of the KL, a distance that punishes leaving in either
    direction."""
    return (logprobs - ref_logprobs).abs()


def squared(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """d², twice k2."""
    return (logprobs - ref_logprobs).square()


def exact_kl(
    logprobs: Float[Tensor, "*n V"], ref_logprobs: Float[Tensor, "*n V"]
) -> Float[Tensor, "*n"]:
    """Σ_v π(v) (log π(v) − log π_ref(v)), from the log-probs of the whole vocabulary.

    π = (0.5, 0.5), π_ref = (0.25, 0.75): 0.5 log 2 + 0.5 log ⅔ = 0.1438. A token that π rules out
    adds nothing.
    """
    probabilities = logprobs.exp()
    return torch.where(probabilities > 0, probabilities * (logprobs - ref_logprobs), 0.0).sum(
        dim=-1
    )


SAMPLED = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute, "squared": squared}


def estimate(
    estimator: Estimator,
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Tensor | None,
    exact: Float[Tensor, "B T"] | None,
) -> Float[Tensor, "B T"]:
    if estimator == "exact":
        assert exact is not None, "the exact KL is worked out where the logits are"
        return exact
    assert ref_logprobs is not None, "a KL penalty needs a reference"
    return SAMPLED[estimator](logprobs, ref_logprobs)


def kl_to_go_of_others(
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    groups: Int[Tensor, "B"],
    own_token: bool = True,
) -> Float[Tensor, "B T"]:
    """Return for token n of each response the mean of Σ_{m ≥ n} kl_m over the other responses of
    its group; of the batch, where it is alone in its group. Tokens are counted within the mask, and
    a response that has ended has nothing to go. With `own_token = False` the sum is over m > n.

    KLs (1, 2) and (3, 4, 5) in one group: (12, 9) for the first response, (3, 2, 0) for the second.
    """
    order = _mask_first(mask)
    own = masked(kl, mask).gather(1, order)
    to_go = own.flip(1).cumsum(dim=1).flip(1)
    mean = mean_of_others(to_go if own_token else to_go - own, groups)
    return masked(torch.zeros_like(kl).scatter(1, order, mean), mask)


def by_token(to_go: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return b_n − b_{n+1} at token n of each response, and b_n at its last: summed from a token
    on, they are its b again. (12, 9) gives (3, 9)."""
    order = _mask_first(mask)
    own = masked(to_go, mask).gather(1, order)
    following = torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], dim=1)
    return masked(torch.zeros_like(to_go).scatter(1, order, own - following), mask)


def _mask_first(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the places of each row, those of the mask first, in their order."""
    return torch.argsort(~mask, dim=1, stable=True)


# --- coefficients ---


class Controller(Family):
    """How the coefficient of a KL penalty follows the KL that was measured."""

    def __call__(self, coef: float, kl: float, num_responses: float) -> float:
        """Return the next coefficient. `kl` is the mean KL of a response in nats."""
        raise NotImplementedError


class FixedCoef(Controller):
    """The coefficient stays what it is."""

    type: Literal["fixed"] = "fixed"

    def __call__(self, coef: float, kl: float, num_responses: float) -> float:
        return coef


class AdaptiveCoef(Controller):
    """β ← β (1 + clip(KL / target − 1, ±0.2) · n / horizon), after every step of n responses
    (Ziegler et al. 2019, section 2.2). KL is that of a whole response, in nats.

    β = 0.2, KL = 9, target = 6, n = 64, horizon = 10000: 0.2 (1 + 0.2 · 0.0064) = 0.200256.
    """

    type: Literal["adaptive"] = "adaptive"
    target: float = Field(
        default=6.0, gt=0, description="The KL of a response to aim at, in nats. Typical: 1 to 20."
    )
    horizon: int = Field(
        default=10_000, gt=0, description="Responses over which β may grow by a fifth."
    )

    def __call__(self, coef: float, kl: float, num_responses: float) -> float:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coef * (1 + error * num_responses / self.horizon)


# --- placements ---


class KL(Family):
    """Where the divergence from the reference goes: into the reward, into the loss, both, or
    neither (the default)."""

    needs_reference: ClassVar[bool] = True

    @property
    def exact_reward(self) -> bool:
        """Whether `reward` reads the exact KL over the vocabulary."""
        return False

    @property
    def changes_rewards(self) -> bool:
        """Whether it changes rewards."""
        return type(self).reward is not KL.reward

    @property
    def exact_loss(self) -> bool:
        """Whether `loss` reads the exact KL over the vocabulary."""
        return False

    @property
    def reads_sampler(self) -> bool:
        """Whether the `old_logprobs` of its loss are those of the policy that sampled, also where
        the step begins with another one (servers, a staleness)."""
        return False

    def reward(
        self, old_logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None, exact: Tensor | None
    ) -> Float[Tensor, "B T"]:
        """Return what is added to each token's reward. It has no gradient."""
        return torch.zeros_like(old_logprobs)

    def loss(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        ref_logprobs: Tensor | None,
        exact: Tensor | None,
        mask: Bool[Tensor, "B T"],
        baselines: Tensor | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return what is added to each token's loss. `baselines` is what `token_baselines` returned
        for these rows."""
        return torch.zeros_like(logprobs)

    def token_baselines(self, batch: Batch) -> Float[Tensor, "B T"] | None:
        """Return a number for each token, from everything that a step has sampled, with which
        `loss` lowers the variance of its gradient; None, the default, where it needs none."""
        return None

    def adapt(self, metrics: Mapping[str, float]) -> "KL":
        """Return the part of the next step, after a step with these metrics; by default itself."""
        return self


class NoKL(KL):
    """The reference is not consulted, and not loaded."""

    type: Literal["none"] = "none"
    needs_reference = False


class KLInReward(KL):
    """Token reward −coef · KL(π_old ‖ π_ref), a constant for the update (Ziegler et al. 2019, eq.
    2).

    With k1 the best policy of the penalised reward is exactly π_ref · exp(score / coef),
    normalised. With no other estimator is it: a policy gradient takes the reward for a constant,
    and of k1 alone the part that it misses is 0. The exact KL is the same whichever token is chosen
    next, so the token that should pay for it does not; it is offered because texts and libraries
    propose it. The coefficient is the controller's state: `adapt` returns a part with the next one.
    """

    type: Literal["in_reward"] = "in_reward"
    estimator: Estimator = Field(
        default="k1",
        description="How the KL of a token is estimated from its log-probs "
        '(docs/algorithms.md). Typical in the reward: "k1".',
    )
    coef: float = Field(default=0.05, ge=0, description=f"{COEF} Typical: 0.01 to 0.2.")
    controller: Controller = FixedCoef()

    @property
    def exact_reward(self) -> bool:
        return self.estimator == "exact"

    def reward(
        self, old_logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None, exact: Tensor | None
    ) -> Float[Tensor, "B T"]:
        return -self.coef * estimate(self.estimator, old_logprobs, ref_logprobs, exact)

    def coefficients(self) -> dict[str, float]:
        return {"kl/coef": self.coef}

    def adapt(self, metrics: Mapping[str, float]) -> "KL":
        return dataclasses.replace(
            self, coef=self.controller(self.coef, metrics["kl"], metrics["responses"])
        )


class KLInLoss(KL):
    """Token loss coef · w_t · KL(π ‖ π_ref), differentiated with the rest of the loss (Shao et al.
    2024, GRPO, eq. 3–4).

    The weight w_t says which gradient that is. Its π_old is the policy that sampled: the sampler's
    own log-probs are read, also where they are those of a server or of older weights.

    - "none": w = 1, as most libraries have it. The gradient of a sampled k3 is not that of the KL,
      that of k1 is 0 in expectation, and that of k2 is that of this token's KL.
    - "token": w_t = π(token t) / π_old(token t). Unbiased for the KL of each token's distribution,
      as in DeepSeek-V3.2; for k1 and k3 only.
    - "sequence": w_t = Π_{s ≤ t} π(s) / π_old(s), the product up to this token (before it, for the
      exact KL). The gradient is that of the KL of whole responses: it includes that an early token
      decides how far later ones will be from the reference.

    The gradient by "sequence" multiplies ∇log π(token t) by the weighted KL of this token and all
    later ones, Σ_{s ≥ t} w_s KL_s. With `baseline = "leave_one_out"` it is Σ_{s ≥ t} w_s (KL_s −
    c_s) instead, where c_s is the KL of the token at the same place in the other responses, at
    π_old and on average (`kl_to_go_of_others`); what they have left after the end of this response
    counts at its last token. c does not depend on this response, and E[w_s ∇log π(token t)] is 0
    for every t ≤ s, so the expectation stays what it was.
    """

    type: Literal["in_loss"] = "in_loss"
    estimator: Estimator = Field(
        default="k3",
        description="How the KL of a token is estimated from its log-probs "
        '(docs/algorithms.md). Typical in the loss: "k3".',
    )
    coef: float = Field(default=0.04, ge=0, description=f"{COEF} Typical: 0.001 to 0.1.")
    weight: Literal["none", "token", "sequence"] = Field(
        default="none",
        description="What weights the KL of a token: nothing, its ratio π / π_old "
        '("token"), or the product of the ratios up to it ("sequence").',
    )
    baseline: Literal["none", "leave_one_out"] = Field(
        default="none",
        description="What is subtracted from the KL to go: nothing, or the mean KL to go of the "
        "other responses to the prompt (of the step, where there are none).",
    )
    controller: Controller = FixedCoef()

    @model_validator(mode="after")
    def _weighs_what_is_unbiased(self) -> "KLInLoss":
        if self.baseline != "none" and self.weight != "sequence":
            raise ValueError(
                f'kl.baseline = "{self.baseline}" lowers the variance of the KL of later tokens, '
                f'which kl.weight = "{self.weight}" leaves out. Use kl.weight = "sequence".'
            )
        if self.weight != "none" and self.estimator in {"k2", "abs", "squared"}:
            raise ValueError(
                f'kl.weight = "{self.weight}" corrects k1, k3 and exact only; {self.estimator} is '
                f"no unbiased estimate of the "
                'KL. Use kl.estimator = "k3".'
            )
        if self.weight == "token" and self.estimator == "exact":
            raise ValueError(
                'kl.weight = "token" corrects for a sampled token; the exact KL has none. Use '
                '"sequence" or "none".'
            )
        return self

    @property
    def exact_loss(self) -> bool:
        return self.estimator == "exact"

    @property
    def reads_sampler(self) -> bool:
        return self.weight != "none"

    def loss(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        ref_logprobs: Tensor | None,
        exact: Tensor | None,
        mask: Bool[Tensor, "B T"],
        baselines: Tensor | None = None,
    ) -> Float[Tensor, "B T"]:
        # A NaN of padding would reach the gradient by the products below.
        logprobs = masked(logprobs, mask)
        ref_logprobs = None if ref_logprobs is None else masked(ref_logprobs, mask)
        exact = None if exact is None else masked(exact, mask)
        kl = estimate(self.estimator, logprobs, ref_logprobs, exact)
        log_ratios = logprobs - masked(old_logprobs, mask)
        if self.weight == "token":
            kl = held_exp(log_ratios) * kl
        elif self.weight == "sequence":
            products = log_ratios.cumsum(dim=1)
            before = products - log_ratios if self.estimator == "exact" else products
            kl = held_exp(before) * kl
            if baselines is not None:
                weight = held_exp(products)
                # Its value is 0; its gradient is not, and has expectation 0.
                kl = kl - (weight - weight.detach()) * masked(baselines, mask)
        return self.coef * kl

    def token_baselines(self, batch: Batch) -> Float[Tensor, "B T"] | None:
        if self.baseline == "none":
            return None
        assert batch.ref_logprobs is not None, "a KL penalty needs a reference"
        mask = batch.response_mask
        kl = k3(masked(batch.old_logprobs, mask), masked(batch.ref_logprobs, mask))
        to_go = kl_to_go_of_others(kl, mask, batch.groups, self.estimator != "exact")
        return by_token(to_go, mask)

    def coefficients(self) -> dict[str, float]:
        return {"kl/coef": self.coef}

    def adapt(self, metrics: Mapping[str, float]) -> "KL":
        return dataclasses.replace(
            self, coef=self.controller(self.coef, metrics["kl"], metrics["responses"])
        )
