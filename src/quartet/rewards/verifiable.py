"""Rewards that can be checked."""

from collections.abc import Sequence

from quartet.experience import Rollout


class ExactMatch:
    """1 where the response, white space around it aside, is the answer in the prompt's row; else 0."""

    name = "exact"

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(r.response.strip() == str(r.prompt.extra["answer"]).strip()) for r in rollouts]
