"""AReaL: `areal.utils.functional`, and its normalisation and KL estimators."""

from collections.abc import Mapping
from typing import Any, ClassVar

import areal
from areal.api.cli_args import NormConfig
from areal.utils import functional
from areal.utils.data import KLEstimator, Normalization
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.library import Library, NotOffered, Pairs


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
