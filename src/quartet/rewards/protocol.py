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
