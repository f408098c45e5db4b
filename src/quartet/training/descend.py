"""One optimizer step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from quartet.distributed.team import ALONE, Team
from quartet.errors import NonFinite
from quartet.tensors import Float, Tensor
from quartet.training.optim import Optimizer


def check_finite(
    what: str,
    values: Float[Tensor, "B *rest"],
    ids: Sequence[str],
    tokens: Callable[[int], Sequence[int]] | None = None,
) -> None:
    """Raise `NonFinite` with the id of the first row that holds an infinity or a NaN. `tokens`:
    what the row says."""
    bad = ~values.isfinite().flatten(1).all(dim=1) if values.ndim > 1 else ~values.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise NonFinite(what, ids[row], tokens(row) if tokens else ())


def descend(
    losses: Iterable[Float[Tensor, ""]], optimizers: Mapping[str, Optimizer], team: Team = ALONE
) -> dict[str, float]:
    """Add up the gradients of the losses and let every optimizer take one step. Returns the loss
    and, for each optimizer, the norm of its gradient before clipping.

    The losses of one step share a denominator, so that their sum is the step's loss however it was
    cut, and over however many ranks; every rank takes the same step. They are consumed one by one:
    only one graph is alive at a time. Nothing steps unless every number is finite; where the
    optimizers are told to skip such a step, they do so a few times, and `skipped` is 1 in what is
    returned.
    """
    try:
        total = added_up(losses, team, learn=True)
        team.add_gradients(p for optimizer in optimizers.values() for p in optimizer.parameters)
        norms = {name: optimizer.clip() for name, optimizer in optimizers.items()}
        for what, number in (
            ("loss", total),
            *((f"gradient of the {name}", norm) for name, norm in norms.items()),
        ):
            if not math.isfinite(number):
                raise NonFinite(f"the {what}")
    except BaseException as error:
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


def added_up(losses: Iterable[Float[Tensor, ""]], team: Team = ALONE, learn: bool = False) -> float:
    """The sum of the losses over all ranks. What is not finite on one rank is raised on all.
    `learn`: this rank's share of the gradients is then where torch puts them."""
    total, error = 0.0, None
    try:
        for loss in losses:
            if learn:
                loss.backward()
            total += float(loss.detach())
    except NonFinite as found:
        error = found
    [failures, everything] = team.total(float(error is not None), total)
    if not failures:
        return everything
    said = team.exchange(None if error is None else [error.what, error.sample, error.tokens])
    raise NonFinite(*next(words for words in said if words is not None))
