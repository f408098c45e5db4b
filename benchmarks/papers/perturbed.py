"""A generator whose distribution is not the learner's: how far apart they are, and in what way, is
a setting.

It is a part as docs/extending.md describes them, and needs nothing that is not public. In a run's
file it is `type = "perturbed.py:Perturbed"`, from Python `generator=Perturbed(sigma=0.3)`. The
doctor stops such a run; mismatch.py lets it go on.
"""

import copy
import dataclasses
from collections import deque
from typing import Literal

import torch

import quartet
from quartet.generation.sampling import Drawn, draw
from quartet.tensors import Float, Int, Tensor

ROUNDED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
OFFSETS = 4_096
"""The largest vocabulary that fixed noise is made for."""


class Perturbed(quartet.GeneratorSource):
    """Samples from a distribution near the policy's, and records the log-probs of that
    distribution. Only `noise = "recorded"` samples from the policy, and records wrong log-probs."""

    sigma: float = quartet.Field(
        default=0.0, ge=0, description="The standard deviation of the noise, in nats."
    )
    noise: Literal["fresh", "fixed", "recorded"] = quartet.Field(
        default="fresh",
        description="What has noise: each logit at each token anew; the logit of each id, always "
        "the same; or the recorded log-prob of each token.",
    )
    temperature: float = quartet.Field(default=1.0, gt=0, description="Of the sampler alone.")
    top_p: float = quartet.Field(default=1.0, gt=0, le=1, description="Of the sampler alone.")
    weights: Literal["fp32", "bf16", "fp8"] = quartet.Field(
        default="fp32", description="What the sampler's weights are rounded to; fp8 is E4M3."
    )
    staleness: int = quartet.Field(
        default=0, ge=0, description="How many updates later than it should new weights come."
    )

    def make(self, context: quartet.GeneratorContext) -> "PerturbedGenerator":
        return PerturbedGenerator(self, context)


class PerturbedGenerator(quartet.NativeGenerator):
    """The native generator with other weights, other logits or other records. Noise has a random
    number generator of its own, so responses without it are those of the native generator."""

    def __init__(self, source: Perturbed, context: quartet.GeneratorContext) -> None:
        copied = source.weights != "fp32" or source.staleness > 0
        model = copy.deepcopy(context.model) if copied else context.model
        stop_ids, seed = context.stop_ids, context.seed
        super().__init__(model, context.tokenizer, stop_ids, seed, copied=copied)
        self.source = source
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.offsets = torch.randn(OFFSETS, generator=torch.Generator().manual_seed(seed))
        self.waiting: deque[quartet.Weights] = deque()
        """Weights that have come and are not used yet, the oldest first."""
        self._use(quartet.Weights(0, dict(context.model.state_dict())))

    def load_weights(self, weights: quartet.Weights) -> None:
        if not self.source.staleness:
            self._use(weights)
            return
        names = self.model.state_dict()
        tensors = {name: weights.tensors[name].detach().clone() for name in names}
        self.waiting.append(quartet.Weights(weights.version, tensors))
        if len(self.waiting) > self.source.staleness:
            self._use(self.waiting.popleft())

    def _use(self, weights: quartet.Weights) -> None:
        super().load_weights(weights)
        dtype = ROUNDED.get(self.source.weights)
        if dtype is not None:
            with torch.no_grad():
                for tensor in self.model.state_dict().values():
                    tensor.copy_(tensor.to(dtype))

    def _draw(
        self,
        logits: Float[Tensor, "B V"],
        sampling: quartet.Sampling,
        noise: Float[Tensor, "B"],
        rows: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"],
    ) -> Drawn:
        source = self.source
        sampling = dataclasses.replace(sampling, temperature=source.temperature, top_p=source.top_p)
        if source.noise == "fixed":
            logits = logits + source.sigma * self.offsets[: logits.shape[-1]]
        elif source.noise == "fresh":
            logits = logits + source.sigma * torch.randn(logits.shape, generator=self.noise)
        drawn = draw(logits, sampling, noise)
        if source.noise == "recorded":
            error = source.sigma * torch.randn(drawn.logprobs.shape, generator=self.noise)
            drawn = dataclasses.replace(drawn, logprobs=drawn.logprobs + error)
        return drawn
