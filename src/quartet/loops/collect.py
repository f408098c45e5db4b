"""The rollouts of one step: generated, rewarded, and worth learning from."""

import dataclasses
import itertools
from collections.abc import Sequence

from quartet.algorithms.algorithm import Algorithm
from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.rewards.protocol import Weighted, rewarded, with_score


def collect(
    prompts: Sampler[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    algorithm: Algorithm,
) -> tuple[list[Rollout], float]:
    """One batch of prompts' rollouts, without those that no reward could score, and the share of these; where the algorithm
    drops groups, batches until as many groups are kept as one batch has prompts, or its rounds are used up. If nothing at all
    was kept, the last batch as it is."""
    kept: list[list[Rollout]] = []
    generated, unscored = 0, 0
    for _ in range(algorithm.groups.max_rounds):
        batch = prompts.next()
        rollouts = answers(batch, generator, sampling, samples_per_prompt, rewards, algorithm)
        scored = with_score(rollouts)
        generated, unscored = generated + len(rollouts), unscored + len(rollouts) - len(scored)
        groups = [list(group) for _, group in itertools.groupby(scored, key=lambda r: r.group)]
        kept += [group for group in groups if algorithm.groups.keep([r.score or 0.0 for r in group])]
        if len(kept) >= len(batch):
            break
    chosen = kept[: len(batch)] or groups
    rollouts = [dataclasses.replace(r, group=number) for number, group in enumerate(chosen) for r in group]
    return rollouts, unscored / generated


def answers(
    prompts: Sequence[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    algorithm: Algorithm,
) -> list[Rollout]:
    """To the prompts, with what the rewards give and the algorithm reads."""
    generated = generator.generate(prompts, sampling, samples_per_prompt)
    rollouts = rewarded(generated, rewards, algorithm.needs_token_scores)
    if algorithm.needs_greedy:
        greedy = rewarded(generator.generate(prompts, dataclasses.replace(sampling, top_k=1)), rewards)
        rollouts = [_beside(r, greedy[r.group].score) for r in rollouts]
    return rollouts


def _beside(rollout: Rollout, greedy_score: float | None) -> Rollout:
    """Without a score to compare with, a score says nothing."""
    return dataclasses.replace(rollout, greedy_score=greedy_score, score=None if greedy_score is None else rollout.score)
