"""The rollouts of one step: generated, rewarded, and worth learning from."""

import dataclasses
from collections.abc import Sequence

from quartet.algorithms.algorithm import Algorithm
from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.rewards.protocol import Weighted, rewarded, with_token_scores


def collect(
    prompts: Sampler[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    algorithm: Algorithm,
) -> list[Rollout]:
    """One batch of prompts' rollouts; where the algorithm drops groups, batches until as many groups are kept as one batch has
    prompts, or its rounds are used up. If nothing at all was kept, the last batch as it is."""
    kept: list[list[Rollout]] = []
    for _ in range(algorithm.groups.max_rounds):
        batch = prompts.next()
        rollouts = _rewarded(batch, generator, sampling, samples_per_prompt, rewards, algorithm)
        groups = [rollouts[i : i + samples_per_prompt] for i in range(0, len(rollouts), samples_per_prompt)]
        kept += [group for group in groups if algorithm.groups.keep([r.score or 0.0 for r in group])]
        if len(kept) >= len(batch):
            break
    chosen = kept[: len(batch)] or groups
    return [dataclasses.replace(r, group=number) for number, group in enumerate(chosen) for r in group]


def _rewarded(
    prompts: Sequence[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    algorithm: Algorithm,
) -> list[Rollout]:
    rollouts = rewarded(generator.generate(prompts, sampling, samples_per_prompt), rewards)
    if algorithm.needs_token_scores:
        rollouts = with_token_scores(rollouts, rewards)
    if algorithm.needs_greedy:
        greedy = rewarded(generator.generate(prompts, dataclasses.replace(sampling, top_k=1)), rewards)
        rollouts = [dataclasses.replace(r, greedy_score=greedy[r.group].score) for r in rollouts]
    return rollouts
