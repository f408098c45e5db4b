"""Rewards computed from the text."""

from collections.abc import Callable, Sequence

from quartet.experience import Rollout


class TextReward:
    """A function of the prompt's and the response's text, such as a world's gold reward."""

    def __init__(self, name: str, function: Callable[[str, str], float]) -> None:
        self.name, self.function = name, function

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self.function(r.prompt.text, r.response) for r in rollouts]
