"""An exponential moving average of the actor's weights."""

from collections.abc import Mapping
from typing import Any

import torch

from quartet.distributed.sharding import copy_saved, local_tensor
from quartet.models.protocols import CausalModel


class Ema:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after every optimizer step, in float32 (InstructGPT and
    DeepSpeed-Chat: 0.992).

    Unlike the weights of the last step, the average does not depend on where in an oscillation the
    run stops. It holds the trained parameters by name, sharded as they are.
    """

    def __init__(self, model: CausalModel, decay: float) -> None:
        self.decay = decay
        self.average = {
            name: p.detach().float().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: CausalModel) -> None:
        for name, p in model.named_parameters():
            if name in self.average:
                local_tensor(self.average[name]).lerp_(local_tensor(p).float(), 1 - self.decay)

    def state(self) -> dict[str, Any]:
        return self.average

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, average in self.average.items():
            copy_saved(average, state[name])
