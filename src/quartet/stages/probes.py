"""What an RL stage compares its policy with while it learns: the answers of the policy that it
started from."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.evaluation.compare import Gold, wins_of
from quartet.experience import Rollout, rollout_from_row
from quartet.io.activity import activity
from quartet.training.state_tree import Tree


@dataclass(frozen=True)
class WinRateProbe:
    """Compares the policy, as it learns, with the one that the stage started from, on the same
    held-out prompts."""

    respond: Callable[[], Sequence[Rollout]]
    """Returns the current policy's rewarded responses. It uses the same random numbers each time,
    and none of those that training uses."""
    gold: Gold | None

    def win_rate(self, before: Sequence[Rollout], responses: Sequence[Rollout]) -> float | None:
        """Return the share of prompts on which these responses win against those from before, a tie
        counting half; None if there is no prompt for which both responses have a score."""
        wins = wins_of(before, responses, self.gold)
        return statistics.fmean(wins) if wins else None


class FirstAnswers:
    """Answers to held-out prompts of the policy that a stage starts from, with their scores.

    They are sampled before the first step and are part of each checkpoint: a stage that is resumed
    has another policy, and would have to sample and score them again.
    """

    def __init__(self) -> None:
        self.probes: Sequence[Rollout] = ()
        """What all models evaluate again and again as the policy learns."""
        self.compared: Sequence[Rollout] = ()
        """What the win rate compares the policy's later answers with."""

    def sample(
        self, probes: Callable[[], Sequence[Rollout]], compared: WinRateProbe | None
    ) -> None:
        with activity("first answers"):
            self.probes = probes()
            self.compared = () if compared is None else compared.respond()

    def state(self) -> Tree:
        return {"probes": list(self.probes), "compared": list(self.compared)}

    def load_state(self, state: Any) -> None:
        self.probes, self.compared = (
            [rollout_from_row(row) for row in state[name]] for name in ("probes", "compared")
        )
