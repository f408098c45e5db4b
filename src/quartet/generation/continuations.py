"""Continuations of responses that have begun: from the state before any token, the policy finishes
the response, under the limits and the stop strings of the whole."""

import dataclasses
from collections.abc import Callable, Sequence

from quartet.experience import Prompt, Rollout
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling


def cut(rollout: Rollout, length: int) -> Rollout:
    """Return the first `length` tokens of a response, as the beginning of another one. Its text and
    its score are empty."""
    return dataclasses.replace(
        rollout,
        response_ids=rollout.response_ids[:length],
        logprobs=rollout.logprobs[:length],
        entropies=None if rollout.entropies is None else rollout.entropies[:length],
        kept=None if rollout.kept is None else rollout.kept[:length],
        response="",
        finish_reason="length",
        score=None,
        components={},
        token_scores=None,
        logged_metrics={},
        logged_columns={},
    )


def continued(
    generator: NativeGenerator,
    beginnings: Sequence[Rollout],
    sampling: Sampling,
    samples: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Rollout]]:
    """Return `samples` whole responses that start with each beginning, in its order.

    A beginning of t tokens must go on: none of its tokens ends it, and t < `max_new_tokens`. The
    continuation has at most `max_new_tokens` − t tokens and, with `min_new_tokens`, none that ends
    it too early, so the whole is distributed as the sampler's responses that begin in this way.
    `progress` is called with the number of beginnings that are finished, and of all.
    """
    by_length: dict[int, list[int]] = {}
    for number, beginning in enumerate(beginnings):
        by_length.setdefault(len(beginning.response_ids), []).append(number)
    results: list[list[Rollout]] = [[] for _ in beginnings]
    done = 0
    for length in sorted(by_length):
        numbers = by_length[length]
        rest = dataclasses.replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - length,
            min_new_tokens=max(sampling.min_new_tokens - length, 0),
        )
        prompts = [_as_prompt(beginnings[number]) for number in numbers]
        for i, ending in enumerate(generator.generate(prompts, rest, samples)):
            number, sample = numbers[i // samples], i % samples
            whole = _joined(generator, beginnings[number], ending, sampling, (number, sample))
            results[number].append(whole)
        done += len(numbers)
        if progress is not None:
            progress(done, len(beginnings))
    return results


def _as_prompt(beginning: Rollout) -> Prompt:
    """Return a prompt that ends where the beginning of a response ends."""
    prompt = beginning.prompt
    return dataclasses.replace(prompt, ids=(*prompt.ids, *beginning.response_ids))


def _joined(
    generator: NativeGenerator,
    beginning: Rollout,
    ending: Rollout,
    sampling: Sampling,
    place: tuple[int, int],
) -> Rollout:
    """Return beginning and ending as one response. It ends at its first stop string, which may
    start in one and end in the other."""
    answer = (
        [*beginning.response_ids, *ending.response_ids],
        [*beginning.logprobs, *ending.logprobs],
        [*(beginning.entropies or ()), *(ending.entropies or ())],
        [*(beginning.kept or ()), *(ending.kept or ())],
    )
    prompt = beginning.prompt
    before = generator.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    return generator.as_rollout(prompt, *place, answer, before, sampling)
