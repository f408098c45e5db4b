"""Rewards whose work is divided among the ranks of a process group."""

from collections.abc import Callable, Sequence
from typing import Any

from quartet.distributed.process_group import ProcessGroup
from quartet.experience import Rollout
from quartet.rewards.protocol import (
    Logged,
    LoggingReward,
    Reward,
    RewardError,
    Score,
    TokenReward,
    UncertainReward,
)


class SharedReward:
    """A reward of which each rank computes the scores of its share of the rollouts; all ranks get
    all scores. Responses to one prompt stay on one rank, because some rewards compare them. A
    failure on one rank is raised on all."""

    def __init__(self, reward: Reward, process_group: ProcessGroup) -> None:
        self.reward, self.process_group, self.name = reward, process_group, reward.name

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self._scores_of_all(rollouts, self.reward.score)

    def _scores_of_all(
        self, rollouts: Sequence[Rollout], ask: Callable[[Sequence[Rollout]], Sequence[Any]]
    ) -> list[Any]:
        groups: dict[tuple[int, str], list[int]] = {}
        for row, r in enumerate(rollouts):
            groups.setdefault((r.group, r.prompt.id), []).append(row)
        together = list(groups.values())
        mine = self.process_group.share(
            [sum(len(rollouts[row].response_ids) for row in rows) for rows in together]
        )
        rows = [row for i in mine for row in together[i]]
        try:
            own: Any = [rows, list(ask([rollouts[i] for i in rows])) if rows else []]
        except RewardError as error:
            own = str(error)
        by_rank = self.process_group.all_gather(own)
        if failures := [result for result in by_rank if isinstance(result, str)]:
            raise RewardError(failures[0])
        by_row = {
            row: score
            for rank_rows, scores in by_rank
            for row, score in zip(rank_rows, scores, strict=True)
        }
        return [by_row[row] for row in range(len(rollouts))]


class SharedTokens(SharedReward):
    """A shared reward that also scores tokens."""

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        assert isinstance(self.reward, TokenReward)
        return self._scores_of_all(rollouts, self.reward.token_scores)


class SharedFunction(SharedTokens):
    """A shared reward that scores tokens, and logs metrics and columns."""

    def logged(self, rollouts: Sequence[Rollout]) -> list[Logged]:
        assert isinstance(self.reward, LoggingReward)
        reward = self.reward

        def ask(rows: Sequence[Rollout]) -> list[Any]:
            return [(one.metrics, one.columns) for one in reward.logged(rows)]

        return [Logged(*both) for both in self._scores_of_all(rollouts, ask)]


class SharedUncertain(SharedReward):
    """A shared reward that knows how uncertain its scores are."""

    def uncertain_scores(self, rollouts: Sequence[Rollout]) -> list[tuple[Score, Score]]:
        assert isinstance(self.reward, UncertainReward)
        return self._scores_of_all(rollouts, self.reward.uncertain_scores)


def shared(reward: Reward, process_group: ProcessGroup) -> Reward:
    """Return the reward divided among the ranks; the reward itself where there is one rank, or
    where it divides its rows already."""
    if process_group.world_size == 1 or getattr(reward, "process_group", None) is process_group:
        return reward
    if isinstance(reward, UncertainReward):
        return SharedUncertain(reward, process_group)
    if not isinstance(reward, TokenReward):
        return SharedReward(reward, process_group)
    kind = SharedFunction if isinstance(reward, LoggingReward) else SharedTokens
    return kind(reward, process_group)
