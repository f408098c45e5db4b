"""One optimizer step."""

import math
from collections.abc import Iterable, Mapping

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.errors import NonFinite
from quartet.io.heap import returns_holes
from quartet.tensors import Float, Tensor, torch
from quartet.training.optim import Optimizer


def optimizer_step(
    losses: Iterable[Float[Tensor, ""]],
    optimizers: Mapping[str, Optimizer],
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Sum the gradients of the losses, let every optimizer take one step, and return the total loss
    and the norm of each optimizer's gradient before clipping.

    The losses of one step share a denominator, so their sum is the loss of the step, however it is
    divided into micro-batches and ranks. They are consumed one by one, so only one graph is alive
    at a time. Every rank takes the same step.

    No optimizer steps unless the loss and all gradients are finite: `NonFinite` is raised, or, with
    `on_nonfinite = "skip"`, up to ten such steps are left out and `{"skipped": 1.0}` is returned.
    """
    try:
        total = sum_of_losses(map(_differentiated, losses), process_group)
        process_group.all_reduce_gradients(
            p for optimizer in optimizers.values() for p in optimizer.parameters
        )
        norms = {name: optimizer.clip() for name, optimizer in optimizers.items()}
        numbers = {"loss": total} | {f"gradient of the {name}": n for name, n in norms.items()}
        for what, number in numbers.items():
            if not math.isfinite(number):
                raise NonFinite(f"the {what}")
    except BaseException as error:  # a step that is repeated must begin without gradients
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        if isinstance(error, NonFinite) and all(
            optimizer.skip() for optimizer in optimizers.values()
        ):
            return {"skipped": 1.0}
        raise
    for optimizer in optimizers.values():
        optimizer.step()
    return {"loss": total, **{f"grad_norm/{name}": norm for name, norm in norms.items()}}


def _differentiated(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Add the gradient of a loss to `.grad` of the parameters, and return the loss."""
    with returns_holes():
        loss.backward()
    return loss.detach()


def sum_of_losses(
    losses: Iterable[Float[Tensor, ""]], process_group: ProcessGroup = SINGLE_PROCESS
) -> float:
    """Return the sum of the losses over all ranks.

    A `NonFinite` that is raised on one rank is raised on every rank, so that none waits for
    another.
    """
    found, error = [], None
    try:
        for loss in losses:
            found.append(loss.detach())
    except NonFinite as nonfinite:
        error = nonfinite
    # They are read together: each would cost a wait for the device.
    total = sum(torch.stack(found).tolist(), 0.0) if found else 0.0
    [num_errors, total_of_all] = process_group.all_reduce_sum(float(error is not None), total)
    if not num_errors:
        return total_of_all
    errors = process_group.all_gather(
        None if error is None else [error.what, error.sample, error.tokens]
    )
    raise NonFinite(*next(each for each in errors if each is not None))
