"""torchtune: `torchtune.rlhf` and its losses."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torchtune
from torch import Tensor
from torchtune import rlhf
from torchtune.rlhf import loss as losses

from rl_conformance import conventions
from rl_conformance.library import Library, NotOffered, Pairs


class Torchtune(Library):
    name = "torchtune"
    states: ClassVar[Mapping[str, str]] = {
        conventions.SAMPLE_DEVIATION: "masked_var(unbiased=True)"
    }

    def __init__(self) -> None:
        self.version = torchtune.__version__

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return rlhf.logits_to_logprobs(logits, ids)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return rlhf.get_rewards_ppo(torch.zeros(len(logprobs)), logprobs, ref_logprobs, 1.0)[1]

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)
        return rlhf.get_rewards_ppo(scores, logprobs, ref_logprobs, beta, last)[0]

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """The function whitens advantages; before that they are its returns less the values. It
        knows no turns: its mask is that of the whitening."""
        if (mask.long().diff(dim=1) > 0).any() and mask[:, 0].any():
            raise NotOffered("responses of several turns")
        returns = rlhf.estimate_advantages(values, rewards, gamma, lam, mask)[1]
        return returns - values, returns

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return rlhf.whiten(x, mask, shift_mean=False)

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        if low != high:
            raise NotOffered("one epsilon for both sides")
        zeros = torch.zeros(mask.shape)
        ppo = losses.PPOLoss(epsilon=low, value_coeff=0.0)
        return ppo(old_logprobs, logprobs, advantages, zeros, zeros, zeros, mask, mask)[0]

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        zeros = torch.zeros(mask.shape)
        ppo = losses.PPOLoss(value_clip_range=clip, value_coeff=1.0)
        return ppo(zeros, zeros, zeros, old_values, values, returns, mask, mask)[0]

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return rlhf.masked_mean(loss, mask)

    def _dpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        loss = losses.DPOLoss(beta=beta, label_smoothing=smoothing)
        return loss(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)[0].mean()

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, beta, 0.0)

    def cdpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        return self._dpo(pairs, beta, smoothing)
