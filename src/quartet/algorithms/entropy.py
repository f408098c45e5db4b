"""A reward for staying undecided."""

from typing import Literal

from quartet.parts import Field, part
from quartet.tensors import Float, Tensor


@part
class EntropyBonus:
    """ℓ_t = −coef · H(π(· | tokens before t)), the third term of Schulman et al. 2017, eq. 9.

    At the default of 0 the term is 0 and the entropy is only observed, without a gradient.
    """

    type: Literal["bonus"] = "bonus"
    coef: float = Field(default=0.0, ge=0, description="A negative value would reward certainty. Typical: 0 to 0.01.")

    def __call__(self, entropy: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return -self.coef * entropy
