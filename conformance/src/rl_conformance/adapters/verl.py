"""veRL: its registries of advantages and losses (`verl.trainer.ppo.core_algos`) and its means."""

import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

from rl_conformance import conventions
from rl_conformance.library import Library


def config(**more: Any) -> Any:
    """Return the actor's config with its defaults for what a loss reads."""
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(**required | more)


class Verl(Library):
    name = "verl"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-6): "compute_grpo_outcome_advantage(epsilon)",
        conventions.SAMPLE_DEVIATION: "masked_var(unbiased=True)",
        conventions.HELD_AT_20: "compute_policy_loss_vanilla, a comment",
        conventions.DUAL_CLIP: "ActorConfig.clip_ratio_c",
        conventions.CUT_AT_10: "kl_penalty_forward, a comment",
        conventions.AS_K3: "kl_penalty, docstring",
    }

    def __init__(self) -> None:
        self.version = verl.__version__
        warnings.simplefilter("ignore")  # of the functions that it deprecates

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return torch_functional.logprobs_from_logits(logits, ids, inplace_backward=False)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return core_algos.kl_penalty(logprobs, ref_logprobs, "k1")

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return core_algos.kl_penalty(logprobs, ref_logprobs, "k2")

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return core_algos.kl_penalty(logprobs, ref_logprobs, "k3")

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return core_algos.kl_penalty(logprobs, ref_logprobs, config().kl_loss_type)

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """The function whitens advantages; before that they are its returns less the values."""
        gae = core_algos.compute_gae_advantage_return
        returns = gae(rewards, values, mask.long(), gamma, lam)[1]
        return returns - values, returns

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        function = core_algos.compute_reinforce_plus_plus_outcome_advantage
        return function(rewards, mask.long(), config=SimpleNamespace(gamma=gamma))[1]

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        function = core_algos.compute_reinforce_plus_plus_outcome_advantage
        return function(rewards, mask.long(), config=SimpleNamespace(gamma=gamma))[0]

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch_functional.masked_whiten(x, mask)

    def _of_groups(self, function: Any, scores: Tensor, groups: Tensor, **more: Any) -> Tensor:
        mask = torch.ones(len(scores), 1)
        return function(scores.clone()[:, None], mask, groups.numpy(), **more)[0][:, 0]

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(core_algos.compute_grpo_outcome_advantage, scores, groups)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        function = core_algos.compute_grpo_outcome_advantage
        return self._of_groups(function, scores, groups, norm_adv_by_std_in_grpo=False)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(core_algos.compute_rloo_outcome_advantage, scores, groups)

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        loss = core_algos.get_policy_loss_fn("vanilla")
        settings = config(clip_ratio_low=low, clip_ratio_high=high)
        return loss(old_logprobs, logprobs, advantages, mask.long(), "token-mean", settings)[0]

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        loss = core_algos.get_policy_loss_fn("vanilla")
        settings = config(clip_ratio_c=cap)
        return loss(old_logprobs, logprobs, advantages, mask.long(), "token-mean", settings)[0]

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        loss = core_algos.get_policy_loss_fn("cispo")
        settings = config(clip_ratio_low=1.0, clip_ratio_high=cap - 1)
        return loss(old_logprobs, logprobs, advantages, mask.long(), "token-mean", settings)[0]

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """With the aggregation that its docstring recommends."""
        loss, mean = core_algos.get_policy_loss_fn("gspo"), "seq-mean-token-mean"
        settings = config(clip_ratio_low=low, clip_ratio_high=high)
        return loss(old_logprobs, logprobs, advantages, mask.long(), mean, settings)[0]

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        return core_algos.compute_value_loss(values, returns, old_values, mask.long(), clip)[0]

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return core_algos.agg_loss(loss, mask.long(), "token-mean")

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return core_algos.agg_loss(loss, mask.long(), "seq-mean-token-mean")

    def fixed_length_mean(self, loss: Tensor, mask: Tensor, length: int) -> Tensor:
        mode = "seq-mean-token-sum-norm"
        return core_algos.agg_loss(loss, mask.long(), mode, loss_scale_factor=length)

    def _in_parts(
        self, losses: Sequence[Tensor], masks: Sequence[Tensor], dp_size: int
    ) -> list[Tensor]:
        total = sum(mask.sum() for mask in masks)
        return [
            core_algos.agg_loss(
                loss, mask.long(), "token-mean", dp_size=dp_size, batch_num_tokens=total
            )
            for loss, mask in zip(losses, masks, strict=True)
        ]

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        return torch.stack(self._in_parts(losses, masks, dp_size=1)).sum()

    def over_ranks(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        return torch.stack(self._in_parts(losses, masks, dp_size=len(masks))).mean()
