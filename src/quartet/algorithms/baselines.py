"""Advantages without a critic: what a response earned, less what other responses to the same prompt
earned.

R is the sum of a response's token rewards, KL penalty included where it is in the reward. The parts
that compare whole responses give every token of one the same advantage. A group is the responses to
one prompt; its statistics are taken in float64, and a group of equals, or of one, gets exactly 0:
float32 noise over a tiny deviation would give up to ±1.
"""

from typing import Literal

from quartet.algorithms.advantages import GAMMA, Advantage, return_to_go
from quartet.algorithms.masked import (
    all_equal_in_group,
    group_mean,
    group_size,
    group_std,
    is_best_of_group,
    masked,
)
from quartet.experience import Batch
from quartet.parts import Field
from quartet.tensors import Float, Tensor, torch


def total_reward(token_rewards: Float[Tensor, "B T"], batch: Batch) -> Float[Tensor, "B"]:
    """Return the sum of each response's token rewards. A response without tokens has no place for a
    reward: its score counts as it was given, so that others are compared with it."""
    total = masked(token_rewards, batch.response_mask).sum(dim=1)
    return torch.where(batch.response_mask.any(dim=1), total, batch.scores.to(total.dtype))


def same_for_every_token(advantage: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B T"]:
    return masked(advantage[:, None].expand(batch.response_mask.shape), batch.response_mask)


class ReturnToGo(Advantage):
    """A_t = G_t = Σ_k γ^k r_{t+k}: no baseline at all (REINFORCE, Williams 1992); whitened,
    REINFORCE++ (Hu 2025)."""

    type: Literal["return_to_go"] = "return_to_go"
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        """Return the advantages [B T] and None: without a critic there are no returns."""
        return return_to_go(token_rewards, batch.response_mask, self.gamma), None


class GroupMean(Advantage):
    """A = (R − mean of the group) / (std of the group + eps) (GRPO, Shao et al. 2024); std = "none"
    leaves it undivided (Dr. GRPO, Liu et al. 2025).

    The sample's deviation (n − 1) as in TRL, veRL and OpenRLHF, or the population's (n). Rewards
    (1, 0, 0, 0): 1.5 and three times −0.5 by the sample's 0.5; 1.73 and −0.58 by the population's
    0.433; 0.75 and −0.25 undivided.
    """

    type: Literal["group_mean"] = "group_mean"
    std: Literal["sample", "population", "none"] = "sample"
    eps: float = Field(default=1e-6, gt=0)
    needs_group = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        total = total_reward(token_rewards, batch)
        centred = total.double() - group_mean(total, batch.groups)
        if self.std != "none":
            centred = centred / (
                group_std(total, batch.groups, sample=self.std == "sample") + self.eps
            )
        advantage = torch.where(all_equal_in_group(total, batch.groups), 0.0, centred).to(
            total.dtype
        )
        return same_for_every_token(advantage, batch), None


class LeaveOneOut(Advantage):
    """A_i = R_i − mean of the others' R (RLOO, Kool et al. 2019; Ahmadian et al. 2024). It is n /
    (n − 1) times the distance from the group's mean. Rewards (1, 0, 0, 0): 1 and three times −1/3.

    With `std = "others"` it is divided by the others' sample deviation + eps (NeMo-RL, with
    normalised rewards); where the others are all equal, or one only, it stays as it is. Rewards
    (1, 0, 0, 0): 1, and three times (−1/3) / √(1/3) = −0.577.
    """

    type: Literal["leave_one_out"] = "leave_one_out"
    std: Literal["none", "others"] = Field(
        default="none", description="Whether advantages are divided by the deviation of the others."
    )
    eps: float = Field(default=1e-6, gt=0, description="Added to that deviation.")
    needs_group = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        total = total_reward(token_rewards, batch)
        size = group_size(batch.groups)
        others = (size - 1).clamp(min=1)
        distance = total.double() - group_mean(total, batch.groups)
        centred = distance * size / others
        if self.std == "others":
            # Without i, Σ (R_j − mean)² over the group falls by d_i² · n / (n − 1).
            squares = group_std(total, batch.groups, sample=False).square() * size
            left = squares - distance.square() * size / others
            deviation = (left / (size - 2).clamp(min=1)).clamp(min=0).sqrt()
            alike = (left <= 1e-12 * squares) | (size < 3)
            centred = torch.where(alike, centred, centred / (deviation + self.eps))
        advantage = torch.where(all_equal_in_group(total, batch.groups), 0.0, centred).to(
            total.dtype
        )
        return same_for_every_token(advantage, batch), None


class BestOfGroup(Advantage):
    """A = n / k at the k best of a group's n responses, 0 at the others (RAFT, Dong et al. 2023):
    what is left of a group is imitated. The mean over responses of −A log π is the mean over
    prompts of −log π of their best response. A group of equals has no best one: 0.

    Rewards (1, 0, 0, 0): 4 and three times 0; (1, 1, 0): 1.5, 1.5 and 0.
    """

    type: Literal["best_of_group"] = "best_of_group"
    needs_group = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        total = total_reward(token_rewards, batch)
        best = is_best_of_group(total, batch.groups)
        share = best.double() / group_mean(best.double(), batch.groups)
        alike = all_equal_in_group(total, batch.groups)
        advantage = torch.where(alike, 0.0, share).to(total.dtype)
        return same_for_every_token(advantage, batch), None


class LengthWeightedBaseline(Advantage):
    """A_i = R_i − Σ_j l_j R_j / Σ_j l_j over the group, l_j tokens in response j (OPO, Hao et al.
    2025): the baseline of least variance where a response's gradient is as large as it is long.
    Rewards (1, 0), lengths (3, 1): 1 − 0.75 and −0.75."""

    type: Literal["length_weighted"] = "length_weighted"
    needs_group = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        total = total_reward(token_rewards, batch)
        lengths = batch.response_mask.sum(dim=1).double()
        weighted = group_mean(total.double() * lengths, batch.groups) / group_mean(
            lengths, batch.groups
        ).clamp(min=1e-12)
        alike = all_equal_in_group(total, batch.groups)
        advantage = torch.where(alike, 0.0, total.double() - weighted).to(total.dtype)
        return same_for_every_token(advantage, batch), None


class GreedyBaseline(Advantage):
    """A_t = G_t − score of the greedy response to the same prompt (ReMax, Li et al. 2024, algorithm
    2). The baseline is that response's score as the reward gave it: no KL penalty and no
    shaping."""

    type: Literal["greedy_baseline"] = "greedy_baseline"
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    needs_greedy = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        assert batch.greedy_scores is not None, "greedy_baseline needs the greedy responses' scores"
        to_go = return_to_go(token_rewards, batch.response_mask, self.gamma)
        return masked(to_go - batch.greedy_scores[:, None], batch.response_mask), None
