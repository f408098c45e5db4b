"""Quartet: its formulas, its parts, and for losses `Algorithm.loss`, as its learner calls it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import quartet
from quartet.algorithms import advantages, kl, preference
from quartet.algorithms.advantages import Advantage, Whiten
from quartet.algorithms.aggregation import Aggregation, FixedLength, SequenceMean, TokenMean
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.baselines import GroupMean, LeaveOneOut
from quartet.algorithms.masked import masked
from quartet.algorithms.policy_loss import Cispo, Clip, DualClip, PolicyLoss, SequenceClip
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.value_loss import ClippedValueLoss
from quartet.experience import Batch, Experience
from quartet.models.logprobs import token_logprobs
from rl_conformance import conventions
from rl_conformance.library import Library, Pairs


def experience(old: Tensor, advantages_: Tensor, mask: Tensor, **more: Tensor) -> Experience:
    """Return an experience, 0 outside the mask, as `Algorithm.experience` returns them."""
    rows, width = mask.shape
    others: dict[str, Any] = {name: masked(each, mask) for name, each in more.items()}
    return Experience(
        ids=tuple(str(row) for row in range(rows)),
        tokens=torch.zeros(mask.shape, dtype=torch.long),
        lengths=torch.full((rows,), width),
        response_mask=mask,
        old_logprobs=masked(old, mask),
        token_rewards=torch.zeros(mask.shape),
        advantages=masked(advantages_, mask),
        scores=torch.zeros(rows),
        **others,
    )


def batch_of(scores: Tensor, mask: Tensor, groups: Tensor, old: Tensor) -> Batch:
    return Batch(
        ids=tuple(str(row) for row in range(len(scores))),
        tokens=torch.zeros(mask.shape, dtype=torch.long),
        lengths=torch.full((len(scores),), mask.shape[1]),
        response_mask=mask,
        scores=scores,
        ended=torch.ones(len(scores), dtype=torch.bool),
        groups=groups,
        rollout_logprobs=old,
        old_logprobs=old,
    )


def of_groups(advantage: Advantage, scores: Tensor, groups: Tensor) -> Tensor:
    """Return the advantage of each response, of one token with the score as its reward."""
    mask = torch.ones(len(scores), 1, dtype=torch.bool)
    batch = batch_of(scores, mask, groups, torch.zeros(mask.shape))
    return advantage(scores[:, None], batch)[0][:, 0]


def in_parts(losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return the sum over pieces of one optimizer step. Ranks add their gradients up, too."""
    mean = TokenMean()
    denominator = sum(mean.denominator(mask) for mask in masks)
    return torch.stack(
        [mean(loss, mask, denominator) for loss, mask in zip(losses, masks, strict=True)]
    ).sum()


class Quartet(Library):
    name = "quartet"
    states: ClassVar[Mapping[str, str]] = {
        conventions.epsilon(1e-6): "GroupMean.eps",
        conventions.HELD_AT_20: "docs/algorithms.md, ppo, deviations",
        conventions.AS_K3: "docs/algorithms.md, what reaches the optimum",
        conventions.PER_PAIR: "docs/algorithms.md, kto",
    }

    def __init__(self) -> None:
        self.version = quartet.__version__

    def _loss(self, part: PolicyLoss, mean: Aggregation, tokens: tuple[Tensor, ...]) -> Tensor:
        logprobs, old, advantages_, mask = tokens
        algorithm = Algorithm(
            advantage=GroupMean(), kl=kl.NoKL(), aggregation=mean, policy_loss=part
        )
        rows = experience(old, advantages_, mask)
        now = Forward(logprobs=logprobs, entropy=torch.zeros(mask.shape))
        return algorithm.loss(rows, now, algorithm.denominators(rows))["policy"]

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(logits, ids, 1.0)

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return kl.k1(logprobs, ref_logprobs)

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return kl.k2(logprobs, ref_logprobs)

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return kl.k3(logprobs, ref_logprobs)

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        part = ALGORITHMS["grpo"].kl
        assert isinstance(part, kl.KLInLoss)
        return part.loss(logprobs, old_logprobs, ref_logprobs, None, mask) / part.coef

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        advantage = advantages.gae(rewards, values, mask, gamma, lam)
        return advantage, masked(advantage + values, mask)

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        algorithm = Algorithm(
            advantage=GroupMean(), kl=kl.KLInReward(coef=beta), aggregation=TokenMean()
        )
        batch = batch_of(scores, mask, torch.zeros(len(scores), dtype=torch.long), logprobs)
        return algorithm.token_rewards(dataclasses.replace(batch, ref_logprobs=ref_logprobs))

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return advantages.return_to_go(rewards, mask, gamma)

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        return Whiten()(x, mask)

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return of_groups(GroupMean(), scores, groups)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return of_groups(GroupMean(std="none"), scores, groups)

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        return of_groups(LeaveOneOut(), scores, groups)

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        return Whiten()(advantages.return_to_go(rewards, mask, gamma), mask)

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
        return self._loss(Clip(low=low, high=high), TokenMean(), tokens)

    def dual_clip_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._loss(DualClip(cap=cap), TokenMean(), tokens)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._loss(Cispo(ratio_max=cap), TokenMean(), tokens)

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
        return self._loss(SequenceClip(low=low, high=high), SequenceMean(), tokens)

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        zeros = torch.zeros(mask.shape)
        algorithm = Algorithm(
            advantage=advantages.Gae(),
            kl=kl.NoKL(),
            aggregation=TokenMean(),
            value_loss=ClippedValueLoss(clip=clip, coef=1.0),
        )
        rows = experience(zeros, zeros, mask, values=old_values, returns=returns)
        now = Forward(logprobs=zeros, entropy=zeros, values=values)
        return algorithm.loss(rows, now, algorithm.denominators(rows))["value"]

    def _mean(self, mean: Aggregation, loss: Tensor, mask: Tensor) -> Tensor:
        return mean(loss, mask, mean.denominator(mask))

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(TokenMean(), loss, mask)

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._mean(SequenceMean(), loss, mask)

    def fixed_length_mean(self, loss: Tensor, mask: Tensor, length: int) -> Tensor:
        return self._mean(FixedLength(length=length), loss, mask)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        return in_parts(losses, masks)

    def over_ranks(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        return in_parts(losses, masks)

    def _pairs(self, pairs: Pairs, **more: Any) -> preference.Pairs:
        return preference.Pairs(**vars(pairs), **more)

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        return preference.Dpo(beta=beta)(self._pairs(pairs)).mean()

    def cdpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        return preference.Dpo(beta=beta, label_smoothing=smoothing)(self._pairs(pairs)).mean()

    def ipo(self, pairs: Pairs, beta: float) -> Tensor:
        return preference.Ipo(beta=beta)(self._pairs(pairs)).mean()

    def kto(self, pairs: Pairs, kl: float, beta: float) -> Tensor:
        return preference.Kto(beta=beta)(self._pairs(pairs, kl=kl)).mean()

    def orpo(self, pairs: Pairs, weight: float) -> Tensor:
        return preference.Orpo(weight=weight)(self._pairs(pairs)).mean()

    def simpo(self, pairs: Pairs, beta: float, gamma: float) -> Tensor:
        return preference.Simpo(beta=beta, gamma=gamma)(self._pairs(pairs)).mean()

    def bradley_terry(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.bradley_terry(chosen, rejected).mean()
