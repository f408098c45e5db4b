"""Monte Carlo values of states within responses: the policy goes on from each, and rewards score
how it ended."""

import dataclasses
import statistics
from collections.abc import Sequence

from quartet.algorithms.advantages import Advantage
from quartet.errors import QuartetError
from quartet.experience import Rollout
from quartet.generation.continuations import continued, cut
from quartet.generation.native import NativeGenerator
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.rewards.protocol import Weighted, rewarded


def with_state_values(
    rollouts: Sequence[Rollout],
    generator: Generator,
    rewards: Sequence[Weighted],
    advantage: Advantage,
    sampling: Sampling,
) -> list[Rollout]:
    """Return the rollouts with the mean score of `advantage.num_continuations` continuations from
    each of their states, and with the tokens that these took.

    States that several responses share, such as the prompt, are sampled from once; their tokens are
    counted for the first response. A state whose continuations have no score has no value.
    """
    if not isinstance(generator, NativeGenerator):
        raise QuartetError(
            f"{type(generator).__name__} cannot go on from the middle of a response, which "
            f"{advantage.type} needs. Use the native generator."
        )
    text = generator.tokenizer.decode
    places = [advantage.states([text([token]) for token in r.response_ids]) for r in rollouts]
    states = {
        (*rollout.prompt.ids, -1, *rollout.response_ids[:t]): cut(rollout, t)
        for rollout, own in zip(rollouts, places, strict=True)
        for t in own
    }
    with activity("continuations"):
        sets = continued(generator, list(states.values()), sampling, advantage.num_continuations)
    counted = [w for w in rewards if w.weight != 0]
    scored = iter(rewarded([r for own in sets for r in own], counted))
    values: dict[tuple[int, ...], float | None] = {}
    tokens: dict[tuple[int, ...], int] = {}
    for (key, state), own in zip(states.items(), sets, strict=True):
        known = [r.score for r in (next(scored) for _ in own) if r.score is not None]
        values[key] = statistics.fmean(known) if known else None
        tokens[key] = sum(len(r.response_ids) - len(state.response_ids) for r in own)
    results = []
    for rollout, own_places in zip(rollouts, places, strict=True):
        numbers: list[float | None] = [None] * len(rollout.response_ids)
        count = 0
        for t in own_places:
            key = (*rollout.prompt.ids, -1, *rollout.response_ids[:t])
            numbers[t] = values[key]
            count += tokens.pop(key, 0)
        results.append(
            dataclasses.replace(rollout, state_values=tuple(numbers), continuation_tokens=count)
        )
    return results
