"""The fault lab: the usual mistakes of PPO on language models, planted on purpose, so that the
doctor can be seen to find them.

Each takes the components of an RL stage and spoils one of them. `quartet run … --break NAME` is for
teaching and for tests.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from quartet.experience import Batch, Experience
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.stages.rl import RLComponents


def temperature(components: RLComponents) -> None:
    """The sampler draws at 0.6 of the temperature that the learner reckons with."""
    _resample(
        components,
        lambda sampling: dataclasses.replace(sampling, temperature=0.6 * sampling.temperature),
    )


def greedy(components: RLComponents) -> None:
    """The sampler takes the most probable token, and reports its probability under the policy."""
    _resample(components, lambda sampling: dataclasses.replace(sampling, top_k=1))
    _rescore(
        components, lambda batch: dataclasses.replace(batch, rollout_logprobs=batch.old_logprobs)
    )


def eos(components: RLComponents) -> None:
    """The sampler does not know where to stop."""
    generator = _plain(components, "eos")
    generator.stop_ids = generator.stop_ids[:0]


def shift(components: RLComponents) -> None:
    """The old log-probs stand one token too late."""
    _rescore(
        components,
        lambda batch: dataclasses.replace(batch, old_logprobs=batch.old_logprobs.roll(1, dims=1)),
    )


def stale(components: RLComponents) -> None:
    """The sampler never gets new weights."""
    generator = _plain(components, "stale")
    generator.model = copy.deepcopy(generator.model)


def reference(components: RLComponents) -> None:
    """The reference is another model than RL starts from."""
    if components.learner.reference is None:
        raise ValueError("--break reference: this algorithm has no reference.")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in components.learner.reference.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=noise).to(weight.device))


def leak(components: RLComponents) -> None:
    """The tokens of the prompt count as the response's."""

    def everything(batch: Batch) -> Batch:
        places = torch.arange(batch.tokens.shape[1], device=batch.lengths.device)
        return dataclasses.replace(
            batch, response_mask=(places > 0) & (places < batch.lengths[:, None])
        )

    _rescore(components, everything)


def sign(components: RLComponents) -> None:
    """The loss is maximised."""
    _relearn(
        components,
        lambda experience: dataclasses.replace(experience, advantages=-experience.advantages),
    )


def broadcast(components: RLComponents) -> None:
    """A [B, 1] met a [B]: every response is paid for its neighbour's."""

    def neighbour(experience: Experience) -> Experience:
        returns = None if experience.returns is None else experience.returns.roll(1, dims=0)
        return dataclasses.replace(
            experience, advantages=experience.advantages.roll(1, dims=0), returns=returns
        )

    _relearn(components, neighbour)


def dropout(components: RLComponents) -> None:
    """The update sees a policy with noise in it."""
    forward = components.learner.models.forward

    def noisy(*arguments: Any, **named: Any) -> Any:
        now = forward(*arguments, **named)
        if not torch.is_grad_enabled():
            return now
        return dataclasses.replace(
            now, logprobs=now.logprobs + 0.05 * torch.randn_like(now.logprobs)
        )

    components.learner.models.forward = noisy  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[RLComponents], None]] = {
    fault.__name__: fault
    for fault in (temperature, greedy, eos, shift, stale, reference, leak, sign, broadcast, dropout)
}


def _plain(components: RLComponents, fault: str) -> Any:
    if not isinstance(components.generator, NativeGenerator):
        raise ValueError(f"--break {fault}: is planted in answers of one turn only.")
    return components.generator


def _resample(components: RLComponents, spoil: Callable[[Sampling], Sampling]) -> None:
    generator: Any = components.generator
    generate = generator.generate
    generator.generate = lambda prompts, sampling, *count: generate(
        prompts, spoil(sampling), *count
    )


def _rescore(components: RLComponents, spoil: Callable[[Batch], Batch]) -> None:
    score = components.learner.score
    components.learner.score = lambda rollouts, algorithm: spoil(score(rollouts, algorithm))  # type: ignore[method-assign]


def _relearn(components: RLComponents, spoil: Callable[[Experience], Experience]) -> None:
    update = components.learner.update

    def spoiled(experience: Experience, algorithm: Any) -> Any:
        return update(spoil(experience), algorithm)

    components.learner.update = spoiled  # type: ignore[method-assign]
