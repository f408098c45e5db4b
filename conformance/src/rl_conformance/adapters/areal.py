"""AReaL: `areal.utils.functional`, and its normalisation and KL estimators."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import areal
import torch
from areal.api.cli_args import NormConfig
from areal.utils import functional
from areal.utils.data import KLEstimator, Normalization
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.library import Library, NotOffered, Pairs


def advantages_of(data: dict[str, Tensor], mask: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Return what `PPOActor` computes of a batch. It is given sequences: a prompt of one token, the
    responses, and one token of padding, without which a response counts as cut off. Raises
    NotOffered for padding before a response, which the actor does not expect."""
    try:
        from areal.trainer.ppo.actor import PPOActor
    except ImportError as error:  # it needs many more packages than the functions do
        raise NotOffered(str(error)) from error
    if not mask[:, 0].all():
        raise NotOffered("padding on the left")
    ends = mask.shape[1] - mask.flip(1).long().argmax(dim=1)
    columns = torch.arange(mask.shape[1] + 2)
    values = {
        "reward_bias": 0.0,
        "reward_scaling": 1.0,
        "reward_clip": float("inf"),
        "reward_norm": None,
        "adv_norm": None,
        "mask_no_eos_with_zero": False,
        "discount": 1.0,
        "gae_lambda": 1.0,
        "config": SimpleNamespace(
            overlong_reward_penalty=False, use_decoupled_loss=False, recompute_logprob=False
        ),
    }
    batch = {
        "input_ids": torch.zeros(len(mask), len(columns), dtype=torch.long),
        "rewards": torch.zeros(len(mask)),
        "loss_mask": torch.nn.functional.pad(mask, (1, 1)),
        "attention_mask": columns <= ends[:, None],
        "logprobs": torch.zeros(len(mask), len(columns)),
    }
    return PPOActor._compute_advantages(SimpleNamespace(**values | settings), batch | data)


class AReaL(Library):
    name = "areal"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-5): "NormConfig.eps",
        conventions.SAMPLE_DEVIATION: "NormConfig.std_unbiased",
        conventions.CUT_AT_10: "KLEstimator(apply_clamp=True)",
        conventions.PER_TOKEN: "dpo_preference_loss, docstring",
        conventions.RAW_SCORE: "Normalization, a comment at group_size=1",
        conventions.TOKEN_MEAN: "ppo_actor_loss_fn, a comment at loss_mask_count",
    }

    def __init__(self) -> None:
        self.version = areal.__version__

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return KLEstimator("k1")(logprobs, ref_logprobs)

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return KLEstimator("k2")(logprobs, ref_logprobs)

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return KLEstimator("k3")(logprobs, ref_logprobs)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        """Log-probs of a sequence are at their tokens, those of the reference one before."""
        pad = torch.nn.functional.pad
        data = {
            "rewards": scores,
            "logprobs": pad(logprobs, (1, 1)),
            "ref_logp": pad(ref_logprobs, (0, 2)),
        }
        done = advantages_of(data, mask, kl_ctl=beta, kl_estimator=KLEstimator("k1"))
        return done["tot_rewards"][:, : mask.shape[1]]

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """The rewards are given as those of a KL."""
        pad, width = torch.nn.functional.pad, mask.shape[1]
        settings = {"discount": gamma, "gae_lambda": lam, "kl_ctl": 1.0}
        data = {"values": pad(values, (0, 2))}
        done = advantages_of(data, mask, **settings, kl_estimator=lambda *_: -pad(rewards, (0, 2)))
        return done["advantages"][:, :width], done["returns"][:, :width]

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return Normalization(NormConfig())(x, mask.float())

    def _of_groups(self, scores: Tensor, groups: Tensor, **more: Any) -> Tensor:
        sizes = groups.unique_consecutive(return_counts=True)[1]
        if (sizes != sizes[0]).any():
            raise NotOffered("groups of unequal size")
        settings = NormConfig(mean_level="group", group_size=int(sizes[0]), **more)
        return Normalization(settings)(scores)

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(scores, groups, std_level="group")

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(scores, groups, std_level=None)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return self._of_groups(scores, groups, std_level=None, mean_leave1out=True)

    def _policy_loss(self, tokens: tuple[Tensor, ...], low: float, **more: Any) -> Tensor:
        logprobs, old, advantages, mask = tokens
        return functional.ppo_actor_loss_fn(logprobs, old, old, advantages, low, mask, **more)[0]

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
        return self._policy_loss(tokens, low, eps_clip_higher=high)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        return self._policy_loss((logprobs, old_logprobs, advantages, mask), 0.2, c_clip=cap)

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._policy_loss(
            tokens, low, eps_clip_higher=high, importance_sampling_level="sequence"
        )

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        return functional.ppo_critic_loss_fn(values, old_values, returns, clip, mask)[0]

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        return functional.dpo_preference_loss(chosen - rejected, beta=beta).mean()

    def ipo(self, pairs: Pairs, beta: float) -> Tensor:
        """Of means per token, as the docstring of the loss asks for."""
        chosen = (pairs.chosen - pairs.ref_chosen) / pairs.chosen_tokens
        rejected = (pairs.rejected - pairs.ref_rejected) / pairs.rejected_tokens
        loss = functional.dpo_preference_loss(chosen - rejected, beta=beta, loss_type="ipo")
        return loss.mean()
