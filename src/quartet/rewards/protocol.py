"""What the loop asks of a reward."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from quartet.experience import Rollout


@runtime_checkable
class Reward(Protocol):
    name: str

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One number per rollout, in their order."""
        ...


@runtime_checkable
class TokenReward(Reward, Protocol):
    """A reward that can also say what each token of a response is worth."""

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """For each rollout one number per response token."""
        ...


class RewardError(RuntimeError):
    """A reward that did not keep its contract."""


@dataclass(frozen=True)
class Weighted:
    """A reward and what it counts for."""

    reward: Reward
    weight: float = 1.0


def rewarded(rollouts: Sequence[Rollout], rewards: Sequence[Weighted]) -> list[Rollout]:
    """The rollouts with their score, the weighted sum of the rewards, and with each reward's own number by name."""
    columns = {w.reward.name: w.reward.score(rollouts) for w in rewards}
    for name, column in columns.items():
        if len(column) != len(rollouts):
            raise RewardError(
                f"reward {name} returned {len(column)} values for {len(rollouts)} responses. "
                f"Return a list of {len(rollouts)} numbers."
            )
    return [
        dataclasses.replace(
            rollout,
            score=sum(w.weight * columns[w.reward.name][i] for w in rewards),
            components={name: column[i] for name, column in columns.items()},
        )
        for i, rollout in enumerate(rollouts)
    ]


def with_token_scores(rollouts: Sequence[Rollout], rewards: Sequence[Weighted]) -> list[Rollout]:
    """The rollouts with the weighted sum of the rewards' numbers for each token. Rewards of weight 0 are only watched."""
    total = [[0.0] * len(r.response_ids) for r in rollouts]
    for w in rewards:
        if w.weight == 0:
            continue
        if not isinstance(w.reward, TokenReward):
            raise RewardError(
                f"reward {w.reward.name} gives one number per response, and the algorithm reads one per token. Use a reward "
                'model, or algorithm.rewards.type = "last_token".'
            )
        for i, numbers in enumerate(w.reward.token_scores(rollouts)):
            if len(numbers) != len(total[i]):
                raise RewardError(
                    f"reward {w.reward.name} returned {len(numbers)} token scores for {rollouts[i].id}, "
                    f"which has {len(total[i])} tokens."
                )
            total[i] = [a + w.weight * b for a, b in zip(total[i], numbers, strict=True)]
    return [dataclasses.replace(r, token_scores=tuple(t)) for r, t in zip(rollouts, total, strict=True)]
