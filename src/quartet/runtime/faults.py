"""Common mistakes of PPO on language models, planted on purpose to see that the doctor finds them.

Each function takes the components of an RL stage and breaks one of them. `quartet run … --break
NAME` plants one; it is meant for teaching and for tests.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from quartet.algorithms.algorithm import Forward
from quartet.experience import Batch, Experience
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import ForwardRequest
from quartet.stages.rl import RLComponents


def temperature(components: RLComponents) -> None:
    """The sampler uses 0.6 of the temperature that the learner divides by."""
    _resample(
        components,
        lambda sampling: dataclasses.replace(sampling, temperature=0.6 * sampling.temperature),
    )


def greedy(components: RLComponents) -> None:
    """The sampler always takes the most probable token, but reports the policy's log-prob of it."""
    _resample(components, lambda sampling: dataclasses.replace(sampling, top_k=1))
    _rescore(
        components, lambda batch: dataclasses.replace(batch, rollout_logprobs=batch.old_logprobs)
    )


def eos(components: RLComponents) -> None:
    """The sampler knows no end-of-sequence token, so responses end at the length limit only."""
    generator = _native_generator(components, "eos")
    generator.stop_ids = generator.stop_ids[:0]


def shift(components: RLComponents) -> None:
    """The old log-probs are shifted right by one token."""
    _rescore(
        components,
        lambda batch: dataclasses.replace(batch, old_logprobs=batch.old_logprobs.roll(1, dims=1)),
    )


def stale(components: RLComponents) -> None:
    """The sampler keeps the weights of the start: updates never reach it."""
    generator = _native_generator(components, "stale")
    generator.model = copy.deepcopy(generator.model)


def reference(components: RLComponents) -> None:
    """The reference is not the model that RL starts from: its weights have 10% noise."""
    if components.learner.reference is None:
        raise ValueError("--break reference: this algorithm has no reference model.")
    noise = torch.Generator().manual_seed(0)
    components.learner.placement.settle()  # it may still be on its way to main memory
    with torch.no_grad():
        for weight in components.learner.reference.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=noise).to(weight.device))


def leak(components: RLComponents) -> None:
    """The response mask includes the tokens of the prompt."""

    def mask_all_tokens(batch: Batch) -> Batch:
        positions = torch.arange(batch.tokens.shape[1], device=batch.lengths.device)
        return dataclasses.replace(
            batch, response_mask=(positions > 0) & (positions < batch.lengths[:, None])
        )

    _rescore(components, mask_all_tokens)


def sign(components: RLComponents) -> None:
    """The advantages have the wrong sign, so the update lowers the reward."""
    _relearn(
        components,
        lambda experience: dataclasses.replace(experience, advantages=-experience.advantages),
    )


def broadcast(components: RLComponents) -> None:
    """Each response is trained with the advantages and returns of its neighbour, as a wrong
    broadcast of `[B, 1]` with `[B]` does it."""

    def roll_rows(experience: Experience) -> Experience:
        returns = None if experience.returns is None else experience.returns.roll(1, dims=0)
        return dataclasses.replace(
            experience, advantages=experience.advantages.roll(1, dims=0), returns=returns
        )

    _relearn(components, roll_rows)


def dropout(components: RLComponents) -> None:
    """The policy's log-probs have noise of 0.05 in the update, as with dropout left on."""
    forward_passes = components.learner.models.forward_passes

    def noisy_passes(request: ForwardRequest) -> Iterator[Forward]:
        for outputs in forward_passes(request):
            if outputs.logprobs is None or not torch.is_grad_enabled():  # scoring is without noise
                yield outputs
                continue
            noise = 0.05 * torch.randn_like(outputs.logprobs)
            yield dataclasses.replace(outputs, logprobs=outputs.logprobs + noise)

    components.learner.models.forward_passes = noisy_passes  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[RLComponents], None]] = {
    fault.__name__: fault
    for fault in (temperature, greedy, eos, shift, stale, reference, leak, sign, broadcast, dropout)
}


def _native_generator(components: RLComponents, fault: str) -> Any:
    """Return the native generator of the components. Raises ValueError if they have another."""
    if not isinstance(components.generator, NativeGenerator):
        raise ValueError(f"--break {fault}: needs the native generator and responses of one turn.")
    return components.generator


def _resample(components: RLComponents, change: Callable[[Sampling], Sampling]) -> None:
    """Change the sampling settings that the generator gets."""
    generator: Any = components.generator
    generate = generator.generate
    generator.generate = lambda prompts, sampling, *count: generate(
        prompts, change(sampling), *count
    )


def _rescore(components: RLComponents, change: Callable[[Batch], Batch]) -> None:
    """Change the batches that the learner scores."""
    score = components.learner.score
    components.learner.score = lambda rollouts, algorithm: change(score(rollouts, algorithm))  # type: ignore[method-assign]


def _relearn(components: RLComponents, change: Callable[[Experience], Experience]) -> None:
    """Change the experience that the learner trains on."""
    update = components.learner.update

    def changed_update(experience: Experience, algorithm: Any) -> Any:
        return update(change(experience), algorithm)

    components.learner.update = changed_update  # type: ignore[method-assign]
