"""The load-balancing loss in one optimizer step, and how the load of the experts was divided."""

from quartet.algorithms.load_balancing import Routing
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.tensors import Float, Tensor, torch


class LoadBalancing:
    """Adds up what the routers of one model did in the micro-batches of one optimizer step. Without
    routers all of it is nothing."""

    def __init__(self, coef: float = 0.0) -> None:
        """`coef` multiplies the loss; with 0 the load is only observed."""
        self.coef = coef
        self._loss: Tensor | None = None
        self._loads: Tensor | None = None
        self._tokens: Tensor | None = None

    def added_to(
        self, loss: Float[Tensor, ""], routing: Routing | None, share: float
    ) -> Float[Tensor, ""]:
        """Return the loss of a micro-batch plus coef · share · its load-balancing loss, which is
        recorded. `share` is the micro-batch's share of the tokens of the step on all ranks, and 0
        if another rank counts it."""
        if routing is None:
            return loss
        with torch.set_grad_enabled(self.coef > 0 and torch.is_grad_enabled()):
            balance = share * routing.loss()
        counts = float(share > 0)
        self._loss = _sum(self._loss, balance.detach())
        self._loads = _sum(self._loads, counts * routing.loads())
        self._tokens = _sum(self._tokens, counts * routing.counts.sum())
        return loss + self.coef * balance if self.coef else loss

    def metrics(
        self, process_group: ProcessGroup = SINGLE_PROCESS, name: str = "experts"
    ) -> dict[str, float]:
        """Return the loss, before its coefficient, and the largest share of the tokens that one
        expert of one layer was given; nothing without routers. Every rank must call it."""
        if self._loss is None or self._loads is None or self._tokens is None:
            return {}
        sums = torch.cat([self._loads.flatten(), self._tokens[None], self._loss[None]]).cpu()
        process_group.all_reduce(sums)
        *loads, tokens, loss = sums.tolist()
        return {f"{name}/balance_loss": loss, f"{name}/largest_share": max(loads) / tokens}


def _sum(before: Tensor | None, more: Tensor) -> Tensor:
    return more if before is None else before + more
