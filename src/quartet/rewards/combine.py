"""Several reward models as one reward."""

import statistics
from collections.abc import Sequence
from typing import Literal

from quartet.experience import Rollout
from quartet.rewards.protocol import Reward, Score


class EnsembleReward:
    """Reward models that must not be fooled all at once (Coste et al. 2024): the weighted mean of
    their scores; `lower_bound`, the mean less k deviations (the population's, weighted likewise);
    `min`, the worst case. Scores 1, 2, 6 with equal weights and k = 1: 3, 3 − 2.16 = 0.84, and
    1."""

    def __init__(
        self,
        name: str,
        members: Sequence[Reward],
        weights: Sequence[float] | None = None,
        combine: Literal["mean", "lower_bound", "min"] = "mean",
        k: float = 1.0,
    ) -> None:
        self.name, self.members, self.combine, self.k = name, members, combine, k
        self.weights = list(weights) if weights else [1.0] * len(members)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [score for score, _ in self.uncertain_scores(rollouts)]

    def uncertain_scores(self, rollouts: Sequence[Rollout]) -> list[tuple[Score, Score]]:
        """Return the score of each rollout, and the deviation of its members' scores; None for both
        where a member has no score."""
        rows = zip(*(member.score(rollouts) for member in self.members), strict=True)
        return [
            self._combined([s for s in row if s is not None]) if None not in row else (None, None)
            for row in rows
        ]

    def _combined(self, scores: Sequence[float]) -> tuple[float, float]:
        mean = statistics.fmean(scores, self.weights)
        variance = statistics.fmean([(s - mean) ** 2 for s in scores], self.weights)
        deviation: float = variance**0.5
        if self.combine == "min":
            return min(scores), deviation
        return mean - self.k * deviation * (self.combine == "lower_bound"), deviation
