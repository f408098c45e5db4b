"""The Kullback–Leibler divergence between two policies, estimated from the tokens that one of them sampled, and where
an algorithm puts it: in the reward, in the loss, or nowhere.

Estimators after Schulman 2020, "Approximating KL divergence". For a token x ~ π and the log-ratio
d = log π(x) − log π_ref(x), each estimates KL(π ‖ π_ref) of that token's distribution.
"""

from typing import ClassVar, Literal

from quartet.parts import Field, part
from quartet.tensors import Float, Tensor

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """d. Unbiased, may be negative, high variance."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """d² / 2. Biased as a value; as a loss on sampled tokens its gradient is that of the exact KL."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """exp(−d) − 1 + d. Unbiased, never negative, low variance.

    It is not clamped: a clamp at 10, as some libraries have it, removes the gradient below π/π_ref = 0.074, exactly where
    it is needed.
    """
    difference = ref_logprobs - logprobs
    return difference.expm1() - difference


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@part
class NoKL:
    """The reference is not consulted, and not loaded."""

    type: Literal["none"] = "none"
    needs_reference: ClassVar[bool] = False

    def reward(self, old_logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        return old_logprobs.new_zeros(old_logprobs.shape)

    def loss(self, logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        return logprobs.new_zeros(logprobs.shape)


@part
class KLInReward:
    """Token reward −coef · KL(π_old ‖ π_ref), a constant for the update (Ziegler et al. 2019, eq. 2).

    With k1 the best policy of the penalised reward is exactly π_ref · exp(score / coef), normalised.
    """

    type: Literal["in_reward"] = "in_reward"
    estimator: Estimator = "k1"
    coef: float = Field(
        default=0.05,
        ge=0,
        description="It multiplies a penalty; a negative value rewards leaving the reference model. Typical: 0.01 to 0.2.",
    )
    needs_reference: ClassVar[bool] = True

    def reward(self, old_logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        assert ref_logprobs is not None, "a KL penalty needs a reference"
        return -self.coef * ESTIMATORS[self.estimator](old_logprobs, ref_logprobs)

    def loss(self, logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        return logprobs.new_zeros(logprobs.shape)


@part
class KLInLoss:
    """Token loss coef · KL(π ‖ π_ref), differentiated with the rest of the loss (Shao et al. 2024, GRPO, eq. 3–4).

    Deviation of the practice from the theory, kept because it is the practice: the gradient of a sampled k3 is not the
    gradient of the KL, that of k1 is zero in expectation, that of k2 is right on-policy.
    """

    type: Literal["in_loss"] = "in_loss"
    estimator: Estimator = "k3"
    coef: float = Field(
        default=0.04,
        ge=0,
        description="It multiplies a penalty; a negative value rewards leaving the reference model. Typical: 0.001 to 0.1.",
    )
    needs_reference: ClassVar[bool] = True

    def reward(self, old_logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        return old_logprobs.new_zeros(old_logprobs.shape)

    def loss(self, logprobs: Float[Tensor, "B T"], ref_logprobs: Tensor | None) -> Float[Tensor, "B T"]:
        assert ref_logprobs is not None, "a KL penalty needs a reference"
        return self.coef * ESTIMATORS[self.estimator](logprobs, ref_logprobs)
