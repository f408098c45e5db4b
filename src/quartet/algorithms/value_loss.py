"""What the critic minimises, per token."""

from typing import ClassVar, Literal

from quartet.parts import Family, Field, OrInf
from quartet.tensors import Float, Tensor, torch


class ValueLoss(Family):
    """What the critic minimises, per token."""

    trains_critic: ClassVar[bool] = True

    def __call__(
        self,
        values: Float[Tensor, "B T"],
        old_values: Float[Tensor, "B T"],
        returns: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Return the loss of each token's value."""
        raise NotImplementedError


class NoValueLoss(ValueLoss):
    """There is no critic."""

    type: Literal["none"] = "none"
    trains_critic = False


class ClippedValueLoss(ValueLoss):
    """coef · ½ max((V − R)², (clip(V, V_old ± clip) − R)²), as in OpenAI's PPO2 and Ziegler et al.
    2019.

    The maximum is the pessimistic side: a value that has moved further than `clip` towards its
    target stops moving, one that moved away from it does not. `clip = inf` gives the
    plain half squared error.

    V = 1, V_old = 0, R = 2, clip = 0.2, coef = 1: ½ max(1, (0.2 − 2)²) = 1.62.
    """

    type: Literal["clipped"] = "clipped"
    clip: OrInf = Field(
        default=0.2,
        gt=0,
        description="How far a value may move in one update; inf: freely. Typical: 0.2 to 0.5.",
    )
    coef: float = Field(
        default=0.1,
        gt=0,
        description="The weight beside the policy loss; it matters where actor and critic share a "
        "trunk.",
    )

    def __call__(
        self,
        values: Float[Tensor, "B T"],
        old_values: Float[Tensor, "B T"],
        returns: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        if values.dtype in {torch.float16, torch.bfloat16}:
            values = values.float()
        near = torch.clamp(values, old_values - self.clip, old_values + self.clip)
        return self.coef * torch.maximum((values - returns).square(), (near - returns).square()) / 2
