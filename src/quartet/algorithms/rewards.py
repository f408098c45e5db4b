"""From the score of a response to a reward for each of its tokens."""

from typing import Literal

from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Int, Tensor, torch


def last_token_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B"]:
    """Index of the last response token of each row: the end-of-sequence token where there is one, never the pad after
    it. 0 for a row with an empty response."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, 0).amax(dim=1)


@part
class LastToken:
    """r_T = clip(score, ±clip) on the last response token, 0 on every other (Ziegler et al. 2019).

    The clip bounds what one outlier of the reward model can do to an update (DeepSpeed-Chat: 5).
    """

    type: Literal["last_token"] = "last_token"
    clip: float = Field(default=5.0, gt=0, description="Scores are cut to ± this value; inf leaves them alone.")

    def __call__(self, scores: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        rewards = rewards.scatter(1, last_token_index(mask)[:, None], scores.clamp(-self.clip, self.clip)[:, None])
        return torch.where(mask, rewards, torch.zeros_like(rewards))
