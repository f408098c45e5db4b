"""How much better than expected each token turned out: advantages, and the returns that the critic learns."""

from typing import ClassVar, Literal

from quartet.algorithms.masked import all_equal_in_group, group_mean, group_std, masked, whiten
from quartet.experience import Batch
from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Tensor, torch


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16):

        δ_t = r_t + γ V_{t+1} − V_t          A_t = δ_t + γ λ A_{t+1}

    The value after the last token of the mask is 0. Entries outside the mask are stepped over, as if they were not
    there: the recursion carries the next value and advantage across them.

    Two tokens with rewards (0, 1), values (0.5, 0.6), γ = 1, λ = 0.5: δ = (0.1, 0.4), A = (0.1 + 0.5·0.4, 0.4) = (0.3, 0.4).
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


@part
class Gae:
    """Advantages by GAE with a critic; the critic's targets are advantage + value, taken before whitening.

    Whitening is over all response tokens of the step (Ziegler et al. 2019), so that minibatches do not change it.
    """

    type: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1, description="The discount of later rewards. Typical for text: 1.")
    lam: float = Field(default=0.95, ge=0, le=1, description="0 trusts the critic, 1 the sampled return. Typical: 0.95 to 1.")
    whiten: bool = True
    needs_critic: ClassVar[bool] = True
    needs_group: ClassVar[bool] = False

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        """Advantages and returns, both [B T]."""
        assert batch.values is not None, "Gae needs a critic's values"
        advantages = gae(token_rewards, batch.values, batch.response_mask, self.gamma, self.lam)
        returns = masked(advantages + batch.values, batch.response_mask)
        return whiten(advantages, batch.response_mask) if self.whiten else advantages, returns


@part
class GroupMean:
    """A = (R − mean of the group) / (std of the group + eps), the same for every token of a response (GRPO, Shao et al.
    2024). R is the sum of the response's token rewards; a group is the responses to one prompt.

    std is the sample's (n − 1), as in TRL, veRL and OpenRLHF. A group of equals gets exactly 0: statistics are taken in
    float64 and equality is tested before dividing, where float32 noise over a tiny std would give up to ±1. A group of
    one gets 0.
    """

    type: Literal["group_mean"] = "group_mean"
    divide_by_std: bool = True
    eps: float = Field(default=1e-6, gt=0)
    needs_critic: ClassVar[bool] = False
    needs_group: ClassVar[bool] = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        """Advantages [B T]; there are no returns, for there is no critic."""
        total = masked(token_rewards, batch.response_mask).sum(dim=1)
        centred = total.double() - group_mean(total, batch.groups)
        if self.divide_by_std:
            centred = centred / (group_std(total, batch.groups) + self.eps)
        advantage = torch.where(all_equal_in_group(total, batch.groups), 0.0, centred).to(total.dtype)
        return masked(advantage[:, None].expand_as(token_rewards), batch.response_mask), None
