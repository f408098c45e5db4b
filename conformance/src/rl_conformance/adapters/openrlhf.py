"""OpenRLHF: its losses, and the methods of `RemoteExperienceMaker`, from a checkout."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.checkout import Checkout, FromCheckout
from rl_conformance.library import NotOffered, Pairs

UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
LOSS_UTILS = "openrlhf.utils.loss_utils"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
PENALTY = "openrlhf.trainer.ppo_utils.length_penalty"


def namespace(**values: Any) -> SimpleNamespace:
    """Return nested settings: `advantage__gamma` is `advantage.gamma`."""
    parts: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split("__")
        inner = parts
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return made_of(parts)


def made_of(parts: Mapping[str, Any]) -> SimpleNamespace:
    inner = {k: made_of(v) if isinstance(v, dict) else v for k, v in parts.items()}
    return SimpleNamespace(**inner)


class OpenRLHF(FromCheckout):
    name = "openrlhf"
    repository = "OpenRLHF/OpenRLHF"
    states: ClassVar[Mapping[str, str]] = {
        conventions.HELD_AT_20: "PolicyLoss.forward, clamp(min=-20, max=20)",
        conventions.CUT_AT_10: "compute_approx_kl, clamp(min=-10, max=10)",
        conventions.AS_K1: "--algo.kl.estimator; it recommends k2 or k3 for a loss",
    }

    def opened(self, folder: Path) -> Checkout:
        given = {"openrlhf.utils.logging_utils.init_logger": logging.getLogger}
        modules = (UTILS, LOSS, LOSS_UTILS, MAKER, PENALTY)
        return Checkout(folder, modules, given=given, missing=["flash_attn"])

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.utils, self.losses = self.checkout.module(UTILS), self.checkout.module(LOSS)
        self.loss_utils, self.maker = self.checkout.module(LOSS_UTILS), self.checkout.module(MAKER)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return self.utils.log_probs_from_logits(logits, ids)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.compute_approx_kl(logprobs, ref_logprobs, "k1")

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.compute_approx_kl(logprobs, ref_logprobs, "k2")

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.utils.compute_approx_kl(logprobs, ref_logprobs, "k3")

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """By the default of `--algo.kl.estimator`, which its training step uses."""
        return self.utils.compute_approx_kl(logprobs, ref_logprobs)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        kl = self.k1(logprobs, ref_logprobs)
        return self.utils.compute_reward(scores, beta, kl, action_mask=mask)

    # --- advantages ---

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        function = self.maker.RemoteExperienceMaker.get_advantages_and_returns
        return function(None, values, rewards, mask, gamma, lam)

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        function = self.maker.RemoteExperienceMaker.get_cumulative_returns
        return function(None, rewards, mask, gamma)

    def _experience(
        self,
        estimator: str,
        scores: Tensor,
        rewards: Tensor,
        mask: Tensor,
        group: int,
        gamma: float,
    ) -> Any:
        """Return an experience with advantages. `rewards` [B T] are given as those of a KL with the
        coefficient 1."""
        settings = namespace(
            algo__advantage__estimator=estimator,
            algo__advantage__gamma=gamma,
            algo__advantage__no_std_norm=False,
            rollout__n_samples_per_prompt=group,
            reward__clip_range=None,
            reward__overlong_buffer_len=None,
            reward__stop_properly_penalty_coef=None,
        )
        kind = self.maker.RemoteExperienceMaker
        maker = SimpleNamespace(
            strategy=SimpleNamespace(args=settings),
            advantage_estimator=estimator,
            kl_ctl=SimpleNamespace(value=1.0),
            get_cumulative_returns=lambda *given: kind.get_cumulative_returns(None, *given),
        )
        index = list(range(len(scores)))
        values = {"index": index, "rewards": scores, "kl": -rewards, "action_mask": mask}
        experience = SimpleNamespace(**values, info={})
        return kind.compute_advantages_and_returns(maker, [experience])[0]

    def _of_rewards(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        scores = torch.zeros(len(rewards))
        return self._experience("reinforce", scores, rewards, mask, 1, gamma).advantages

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        """What it does to advantages; with γ = 0 they are the rewards."""
        return self._of_rewards(x, mask, 0.0)

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return self._of_rewards(rewards, mask, gamma)

    def _of_groups(self, estimator: str, scores: Tensor, groups: Tensor) -> Tensor:
        sizes = groups.unique_consecutive(return_counts=True)[1]
        if (sizes != sizes[0]).any():
            raise NotOffered("groups of unequal size")
        if sizes[0] == 1:
            raise NotOffered("train_ppo_ray refuses groups of one")
        zeros, mask = torch.zeros(len(scores), 1), torch.ones(len(scores), 1, dtype=torch.bool)
        arguments = (scores.clone(), zeros, mask, int(sizes[0]), 1.0)
        return self._experience(estimator, *arguments).advantages[:, 0]

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups("group_norm", scores, groups)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups("dr_grpo", scores, groups)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups("rloo", scores, groups)

    # --- losses ---

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        loss = self.losses.PolicyLoss(low, high)
        return loss(logprobs, old_logprobs, advantages, action_mask=mask)[0]

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        loss = self.losses.PolicyLoss(dual_clip=cap)
        return loss(logprobs, old_logprobs, advantages, action_mask=mask)[0]

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        loss = self.losses.PolicyLoss(low, high, policy_loss_type="gspo")
        return loss(logprobs, old_logprobs, advantages, action_mask=mask)[0]

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        return self.losses.ValueLoss(clip)(values, old_values, returns, action_mask=mask)

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self.losses.aggregate_loss(loss, mask, token_level_loss=True)

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self.losses.aggregate_loss(loss, mask, token_level_loss=False)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Its denominators expect that DeepSpeed divides each loss by the number of pieces."""
        mask_of = {"mask_fn": lambda piece: piece[1]}
        pieces = list(zip(losses, masks, strict=True))
        cut = self.loss_utils.iter_grad_accum_global_norm(pieces, None, len(pieces), **mask_of)
        means = [self.losses.aggregate_loss(*piece, **counts) for piece, counts in cut]
        return torch.stack(means).mean()

    def over_ranks(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """One process counts the tokens of all ranks here."""
        counts = self.loss_utils._optimizer_step_loss_norm(masks, None, len(masks), 1)
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self.losses.aggregate_loss(*each, **counts) for each in pieces]).mean()

    # --- comparisons ---

    def _dpo(self, pairs: Pairs, beta: float, **more: Any) -> Tensor:
        loss = self.losses.DPOLoss(beta, **more)
        return loss(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)[0]

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, beta)

    def cdpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        return self._dpo(pairs, beta, label_smoothing=smoothing)

    def ipo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, beta, ipo=True)

    def bradley_terry(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.losses.PairWiseLoss()(chosen, rejected)
