"""SkyRL: its losses, advantages and reductions (`skyrl_train.utils.ppo_utils`), from a checkout.

It lays responses out at the ends of their rows; what sums from the end is called with them there.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.checkout import Checkout, FromCheckout

PACKAGE = "skyrl.backends.skyrl_train.utils"
PPO, TORCH = f"{PACKAGE}.ppo_utils", f"{PACKAGE}.torch_utils"
CORRECTION = f"{PACKAGE}.off_policy_correction_utils"


def config(**more: Any) -> SimpleNamespace:
    """Return what the losses read of the algorithm's config, without a correction."""
    values = {
        "policy_loss_type": "regular",
        "loss_reduction": "sequence_mean",
        "eps_clip_low": 0.2,
        "eps_clip_high": 0.2,
        "off_policy_correction": None,
    }
    return SimpleNamespace(**values | more)


def to_the_right(table: Tensor, mask: Tensor) -> Tensor:
    """Return a table [B T] with each response at the end of its row, as SkyRL lays it out: what was
    behind it comes before it."""
    behind = mask.flip(1).long().argmax(dim=1).tolist()
    return torch.stack([row.roll(n) for row, n in zip(table, behind, strict=True)])


def back(table: Tensor, mask: Tensor) -> Tensor:
    """Undo `to_the_right`."""
    behind = mask.flip(1).long().argmax(dim=1).tolist()
    return torch.stack([row.roll(-n) for row, n in zip(table, behind, strict=True)])


class SkyRL(FromCheckout):
    name = "skyrl"
    repository = "NovaSky-AI/SkyRL"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-6): "compute_grpo_outcome_advantage(epsilon)",
        conventions.SAMPLE_DEVIATION: "masked_var(unbiased=True)",
        conventions.HELD_AT_20: "safe_exp_delta(clip), docstring",
        conventions.CUT_AT_10: "compute_approx_kl, clamp(min=-10, max=10)",
        conventions.AS_K3: "AlgorithmConfig.kl_estimator_type, use_kl_loss",
    }

    def opened(self, folder: Path) -> Checkout:
        given = {
            "loguru.logger": logging.getLogger("skyrl"),
            "ray.is_initialized": lambda: False,
        }
        modules = (PPO, TORCH, CORRECTION)
        return Checkout(folder, modules, given=given, missing=["flash_attn"])

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ppo, self.torch = self.checkout.module(PPO), self.checkout.module(TORCH)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return self.torch.logprobs_from_logits(logits, ids)

    def _kl(self, logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
        return self.ppo.compute_approx_kl(logprobs, ref_logprobs, kl_estimator_type=kind)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, "k1")

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, "k2")

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, "k3")

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """By the default of `kl_estimator_type`."""
        return self._kl(logprobs, ref_logprobs, "k3")

    # --- advantages ---

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """The function whitens advantages; before that they are its returns less the values."""
        gae = self.ppo.compute_gae_advantage_return
        moved = [to_the_right(table, mask) for table in (rewards, values, mask.float())]
        returns = back(gae(*moved, gamma, lam)[1], mask)
        return returns - values, returns

    def _reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> list[Tensor]:
        """Return advantages and returns."""
        function = self.ppo.compute_reinforce_plus_plus_outcome_advantage
        moved = [to_the_right(table, mask) for table in (rewards, mask.float())]
        return [back(table, mask) for table in function(*moved, gamma)]

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return self._reinforce_pp(rewards, mask, gamma)[1]

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return self._reinforce_pp(rewards, mask, gamma)[0]

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.ppo.masked_whiten(x, mask.float())

    def _of_groups(self, function: Any, scores: Tensor, groups: Tensor, **more: Any) -> Tensor:
        mask = torch.ones(len(scores), 1)
        return function(scores.clone()[:, None], mask, groups.numpy(), **more)[0][:, 0]

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(self.ppo.compute_grpo_outcome_advantage, scores, groups)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        function = self.ppo.compute_grpo_outcome_advantage
        return self._of_groups(function, scores, groups, grpo_norm_by_std=False)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(self.ppo.compute_rloo_outcome_advantage, scores, groups)

    # --- losses: sums of what advantages were scaled to before ---

    def _scaled(self, advantages: Tensor, mask: Tensor, reduction: str, length: int = 1) -> Tensor:
        scale = self.ppo.apply_loss_reduction_to_advantages_minibatch
        return scale(advantages, mask.float(), reduction, len(mask), length)

    def _loss(self, function: Any, tokens: Sequence[Tensor], mean: str, **settings: Any) -> Tensor:
        logprobs, old, advantages, mask = tokens
        scaled = self._scaled(advantages, mask, mean)
        return function(logprobs, old, scaled, config(**settings), mask.float())[0]

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        clip = {"eps_clip_low": low, "eps_clip_high": high}
        return self._loss(self.ppo.ppo_policy_loss, tokens, "token_mean", **clip)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        settings = {"policy_loss_type": "dual_clip", "clip_ratio_c": cap}
        return self._loss(self.ppo.ppo_policy_loss, tokens, "token_mean", **settings)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        cispo = {"cispo_anchor": "old", "cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": cap - 1}
        settings = {"cispo": SimpleNamespace(**cispo)}
        return self._loss(self.ppo.compute_policy_loss_cispo, tokens, "token_mean", **settings)

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """With the reduction that it recommends."""
        tokens = (logprobs, old_logprobs, advantages, mask)
        clip = {"eps_clip_low": low, "eps_clip_high": high}
        return self._loss(self.ppo.gspo_policy_loss, tokens, "sequence_mean", **clip)

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        own = config(value_clip=clip)
        return self.ppo.ppo_critic_loss(values, old_values, returns, own, mask.float())[0]

    def _mean(self, loss: Tensor, mask: Tensor, reduction: str, length: int = 1) -> Tensor:
        return self.ppo.reduce_loss(self._scaled(loss, mask, reduction, length), mask.float())

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, "token_mean")

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(loss, mask, "sequence_mean")

    def fixed_length_mean(self, loss: Tensor, mask: Tensor, length: int) -> Tensor:
        return self._mean(loss, mask, "seq_mean_token_sum_norm", length)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Advantages are scaled before the mini-batch is cut; losses of pieces are added."""
        scaled = self._scaled(torch.cat(list(losses)), torch.cat(list(masks)), "token_mean")
        pieces = zip(scaled.split([len(each) for each in losses]), masks, strict=True)
        return torch.stack([self.ppo.reduce_loss(loss, mask) for loss, mask in pieces]).sum()
