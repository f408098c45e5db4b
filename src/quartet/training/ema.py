"""An average of the actor over its past."""

import copy
from collections.abc import Mapping
from typing import Any

import torch


class Ema:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after every optimizer step, in float32 (InstructGPT and DeepSpeed-Chat: 0.992).

    Unlike the last step's weights, the average does not depend on where in an oscillation the run stopped.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: Any) -> None:
        for name, p in model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(p.float(), 1 - self.decay)

    def state(self) -> dict[str, Any]:
        return self.average

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def model(self, like: Any) -> Any:
        """A copy of the model with the average for weights."""
        made = copy.deepcopy(like)
        for name, p in made.named_parameters():
            if name in self.average:
                p.copy_(self.average[name])
        return made
