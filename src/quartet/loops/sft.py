"""Supervised fine-tuning: imitate the answers, and only the answers."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.team import ALONE, Team
from quartet.loops.progress import Progress
from quartet.training.budget import Budget
from quartet.training.descend import added_up, descend
from quartet.training.imitation import imitation_losses
from quartet.training.optim import Optimizer


def sft(
    model: Any,
    demonstrations: Sampler[Demonstration],
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
) -> Iterator[Progress]:
    """Minimise the mean negative log-probability of the answers' tokens; the first steps may be
    done already."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.spend(
            "the update", partial(_step, model, demonstrations.next(), optimizer, budget.team)
        )
        yield Progress(number, {**metrics, "lr": lr})


def _step(
    model: Any,
    batch: Sequence[Demonstration],
    optimizer: Optimizer,
    team: Team,
    micro_batch_tokens: int,
) -> dict[str, float]:
    return descend(
        imitation_losses(model, batch, micro_batch_tokens, team), {"policy": optimizer}, team
    )


@torch.no_grad()
def held_out_loss(
    model: Any, demonstrations: Sequence[Demonstration], micro_batch_tokens: int, team: Team = ALONE
) -> float:
    """Mean negative log-probability per answer token."""
    return added_up(imitation_losses(model, demonstrations, micro_batch_tokens, team), team)
