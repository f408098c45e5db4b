"""Undecidedness, rewarded or held at a level."""

from typing import Literal

from quartet.parts import Family, Field
from quartet.tensors import Float, Tensor, torch


class Entropy(Family):
    """A loss on the policy's entropy. Where `coef` is 0 the entropy is only observed, without a
    gradient."""

    @property
    def coef(self) -> float:
        """What multiplies the entropy in the loss."""
        return 0.0

    def __call__(
        self, entropy: Float[Tensor, "B T"], mean_entropy: Float[Tensor, "B"] | None
    ) -> Float[Tensor, "B T"]:
        """Return the loss of each token. `mean_entropy` is that of π_old over all tokens of the
        step, at each row."""
        raise NotImplementedError


class EntropyBonus(Entropy):
    """ℓ_t = −coef · H(π(· | tokens before t)), the third term of Schulman et al. 2017, eq. 9.

    At the default of 0 the term is 0 and the entropy is only observed, without a gradient.
    """

    type: Literal["bonus"] = "bonus"
    coef: float = Field(
        default=0.0,
        ge=0,
        description="A negative value would reward certainty. Typical: 0 to 0.01.",
    )

    def __call__(
        self, entropy: Float[Tensor, "B T"], mean_entropy: Tensor | None
    ) -> Float[Tensor, "B T"]:
        return -self.coef * entropy


class EntropyTarget(Entropy):
    """coef · |mean entropy − target| (PPO-max, Zheng et al. 2023), in nats per token.

    The absolute value of a mean does not split into rows. Its sign is taken from the mean entropy
    of π_old over the whole step, so that micro-batches add up: ℓ_t = coef · sign(H̄_old − target) ·
    (H_t − target). That is the original until an update crosses the target. MOSS's target of 35 is
    above log V for any vocabulary: there it is a bonus of weight coef.
    """

    type: Literal["target"] = "target"
    target: float = Field(default=1.0, ge=0, description="Mean entropy per token, in nats.")
    coef: float = Field(default=0.01, ge=0)

    def __call__(
        self, entropy: Float[Tensor, "B T"], mean_entropy: Float[Tensor, "B"] | None
    ) -> Float[Tensor, "B T"]:
        assert mean_entropy is not None, (
            "an entropy target needs the entropy of the policy that sampled"
        )
        return self.coef * torch.sign(mean_entropy - self.target)[:, None] * (entropy - self.target)
