"""Responses of the policy as it is, with their scores: what stages sample that are no RL."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling
from quartet.rewards.protocol import Weighted, rewarded


@dataclass(frozen=True)
class Responses:
    """A generator, and the rewards that score what it samples."""

    generator: Generator
    sampling: Sampling
    rewards: Sequence[Weighted]
    weights: Callable[[], Weights] | None = None
    """Returns the policy's weights, for a generator that has a copy of them."""

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int) -> list[Rollout]:
        """Return scored responses of the present policy; those to the first prompt come first."""
        if self.weights is not None:
            self.generator.load_weights(self.weights())
        rollouts = self.generator.generate(prompts, self.sampling, samples_per_prompt)
        return rewarded(rollouts, self.rewards)
