"""The rollouts of one step: generated, rewarded, and filtered."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quartet.algorithms.algorithm import Algorithm
from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.loops.state_values import with_state_values
from quartet.rewards.protocol import Weighted, rewarded, with_score


@dataclass(frozen=True)
class Collected:
    """The rollouts of a step."""

    rollouts: list[Rollout]
    unscored: float = 0.0
    """The share of what was generated that no reward could score."""
    pools: Mapping[str, float] = field(default_factory=dict)
    """The number of prompts by their pass rate, as metrics; empty where no rates are read."""


@dataclass(frozen=True)
class Collector:
    """Collects rollouts: takes the next prompts, generates responses to them, and scores the
    responses."""

    prompts: Sampler[Prompt]
    generator: Generator
    rewards: Sequence[Weighted]
    samples_per_prompt: int = 1

    def collect(self, algorithm: Algorithm, sampling: Sampling) -> Collected:
        """Return the rollouts of one batch of prompts, without those that no reward could score.

        Where the algorithm drops groups (`Groups.keep`), further batches are generated until as
        many groups are kept as one batch has prompts, or `max_rounds` batches were tried; if
        nothing at all was kept, the last batch is returned as it is.
        """
        kept: list[list[Rollout]] = []
        generated, unscored = 0, 0
        for _ in range(algorithm.groups.max_rounds):
            batch = self.prompts.next()
            rollouts = self.respond(batch, algorithm, sampling)
            scored = with_score(rollouts)
            generated, unscored = generated + len(rollouts), unscored + len(rollouts) - len(scored)
            groups = [list(group) for _, group in itertools.groupby(scored, key=lambda r: r.group)]
            for group in groups:
                self.prompts.observe(group)
            kept += [
                group for group in groups if algorithm.groups.keep([r.score or 0.0 for r in group])
            ]
            if len(kept) >= len(batch):
                break
        chosen = kept[: len(batch)] or groups
        rollouts = [
            dataclasses.replace(r, group=number)
            for number, group in enumerate(chosen)
            for r in group
        ]
        return Collected(rollouts, unscored / generated, self.prompts.metrics())

    def respond(
        self, prompts: Sequence[Prompt], algorithm: Algorithm, sampling: Sampling
    ) -> list[Rollout]:
        """Return responses to these prompts with the scores that the algorithm reads."""
        with activity("sampling"):
            generated = self.generator.generate(prompts, sampling, self.samples_per_prompt)
        rollouts = rewarded(generated, self.rewards, algorithm.needs_token_scores)
        if algorithm.needs_greedy:
            greedy = rewarded(
                self.generator.generate(prompts, dataclasses.replace(sampling, top_k=1)),
                self.rewards,
            )
            rollouts = [_with_baseline(r, greedy[r.group].score) for r in rollouts]
        if algorithm.num_continuations:
            rollouts = with_state_values(
                rollouts, self.generator, self.rewards, algorithm.advantage, sampling
            )
        return rollouts

    def load_weights(self, weights: Weights) -> None:
        """Hand the generator the policy's new weights."""
        self.generator.load_weights(weights)


def _with_baseline(rollout: Rollout, greedy_score: float | None) -> Rollout:
    """Return the rollout with the score of the greedy response to its prompt. Without that score it
    counts as unscored."""
    return dataclasses.replace(
        rollout, greedy_score=greedy_score, score=None if greedy_score is None else rollout.score
    )
