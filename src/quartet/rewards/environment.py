"""The rewards of an environment."""

from collections.abc import Sequence

from quartet.experience import Rollout
from quartet.rewards.protocol import RewardError, Score


class EnvironmentReward:
    """The sum of the rewards of an episode's turns; token by token, each on the last token of its
    turn."""

    def __init__(self, name: str = "environment") -> None:
        self.name = name

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [sum(rewards) for rewards in self.token_scores(rollouts)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        made = []
        for rollout in rollouts:
            if rollout.turn_rewards is None:
                raise RewardError(
                    f"{rollout.id} was answered without an environment, so there is no reward of "
                    f"one."
                )
            made.append(list(rollout.turn_rewards))
        return made
