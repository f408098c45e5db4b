"""A generator that one rank speaks to, for all of a team."""

from collections.abc import Callable, Sequence
from typing import Any

from quartet.distributed.team import Gathered, Team, collected
from quartet.experience import Prompt, Rollout, rollout_from, rollout_ready
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling


class Led:
    """The lead asks; everybody hears the answers."""

    def __init__(
        self, generator: Generator, team: Team, only: Callable[[str], bool] | None = None
    ) -> None:
        """`only`: which of the weights the generator reads, where not all."""
        self.generator, self.team, self.only = generator, team, only

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        mine: Any = None
        if self.team.lead:
            mine = [
                rollout_ready(r)
                for r in self.generator.generate(prompts, sampling, samples_per_prompt)
            ]
        return [rollout_from(row) for row in self.team.exchange(mine)[0]]

    def load_weights(self, weights: Weights) -> None:
        tensors = weights.tensors
        if isinstance(tensors, Gathered):  # they may be in parts: then all ranks put them together
            tensors = tensors if self.only is None else tensors.only(self.only)
            tensors = collected(tensors, keep=self.team.lead)
        if self.team.lead:
            self.generator.load_weights(Weights(weights.version, tensors))

    def state(self) -> Any:
        return self.generator.state()

    def load_state(self, state: Any) -> None:
        self.generator.load_state(state)
