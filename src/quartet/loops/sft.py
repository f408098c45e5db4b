"""Supervised fine-tuning: imitate the answers, and only the answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.loops.progress import Progress
from quartet.training.descend import descend
from quartet.training.imitation import imitation_losses
from quartet.training.optim import Optimizer


def sft(
    model: Any,
    demonstrations: Sampler[Demonstration],
    optimizer: Optimizer,
    steps: int,
    micro_batch_tokens: int,
    done: int = 0,
) -> Iterator[Progress]:
    """Minimise the mean negative log-probability of the answers' tokens; the first steps may be done already."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        losses = imitation_losses(model, demonstrations.next(), micro_batch_tokens)
        yield Progress(number, {**descend(losses, {"policy": optimizer}), "lr": lr})


@torch.no_grad()
def held_out_loss(model: Any, demonstrations: Sequence[Demonstration], micro_batch_tokens: int) -> float:
    """Mean negative log-probability per answer token."""
    return float(sum(imitation_losses(model, demonstrations, micro_batch_tokens)))
