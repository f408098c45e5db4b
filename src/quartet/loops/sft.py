"""Supervised fine-tuning: the policy learns the responses of demonstrations, not their prompts."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.loops.progress import Progress
from quartet.models.protocols import CausalModel
from quartet.training.budget import Budget
from quartet.training.imitation import imitation_losses
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step, sum_of_losses


def sft(
    model: CausalModel,
    demonstrations: Sampler[Demonstration],
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
    balance_coef: float = 0.0,
) -> Iterator[Progress]:
    """Yield the steps that follow the first `done` ones. Each minimises the mean negative
    log-probability of the response tokens on one batch, and `balance_coef` times the load-balancing
    loss of a mixture of experts."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within(
            "the update",
            partial(
                _step, model, demonstrations.next(), optimizer, budget.process_group, balance_coef
            ),
        )
        yield Progress(number, {**metrics, "lr": lr})


def _step(
    model: CausalModel,
    batch: Sequence[Demonstration],
    optimizer: Optimizer,
    process_group: ProcessGroup,
    balance_coef: float,
    micro_batch_tokens: int,
) -> dict[str, float]:
    balancing = LoadBalancing(balance_coef)
    metrics = optimizer_step(
        imitation_losses(model, batch, micro_batch_tokens, process_group, balancing),
        {"policy": optimizer},
        process_group,
    )
    return metrics | balancing.metrics(process_group)


@torch.no_grad()
def held_out_loss(
    model: CausalModel,
    demonstrations: Sequence[Demonstration],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> float:
    """Return the mean negative log-probability per response token."""
    return sum_of_losses(
        imitation_losses(model, demonstrations, micro_batch_tokens, process_group), process_group
    )
