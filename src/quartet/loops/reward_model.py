"""The reward model: which of two answers would a person prefer?"""

from collections.abc import Iterator, Sequence

import torch

from quartet.algorithms.preference import bradley_terry
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.loops.progress import Progress
from quartet.models.heads import ScalarModel
from quartet.models.padding import micro_batches, right_pad
from quartet.tensors import Float, Tensor
from quartet.training.descend import check_finite, descend
from quartet.training.optim import Optimizer


def reward_model(
    model: ScalarModel, comparisons: Sampler[Comparison], optimizer: Optimizer, steps: int, micro_batch_tokens: int
) -> Iterator[Progress]:
    """Minimise −log σ(score of chosen − score of rejected)."""
    for number in range(1, steps + 1):
        lr = optimizer.lr
        margins: list[Tensor] = []
        losses = _losses(model, comparisons.next(), micro_batch_tokens, margins)
        metrics = descend(losses, {"reward_model": optimizer})
        seen = torch.cat(margins)
        yield Progress(number, {**metrics, "accuracy": _accuracy(seen), "margin": float(seen.mean()), "lr": lr})


@torch.no_grad()
def pair_accuracy(model: ScalarModel, comparisons: Sequence[Comparison], micro_batch_tokens: int) -> float:
    """The share of pairs whose chosen side scores higher; a tie counts half."""
    margins: list[Tensor] = []
    for _ in _losses(model, comparisons, micro_batch_tokens, margins):
        pass
    return _accuracy(torch.cat(margins))


def _losses(
    model: ScalarModel, batch: Sequence[Comparison], micro_batch_tokens: int, margins: list[Tensor]
) -> Iterator[Float[Tensor, ""]]:
    """The loss of a batch in pieces that add up to it; the margins seen on the way are appended to `margins`."""
    longest = [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in batch]
    for rows in micro_batches(longest, micro_batch_tokens):
        chosen, rejected = _scores(model, [batch[i] for i in rows])
        margins.append((chosen - rejected).detach())
        yield bradley_terry(chosen, rejected).sum() / len(batch)


def _scores(model: ScalarModel, comparisons: Sequence[Comparison]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Scores of the chosen and of the rejected answers; both sides go through the model in one batch."""
    sides = [(*c.prompt_ids, *c.chosen_ids) for c in comparisons]
    sides += [(*c.prompt_ids, *c.rejected_ids) for c in comparisons]
    scores = model.scores(*right_pad(sides, next(model.parameters()).device))
    check_finite("the score", scores, [c.id for c in comparisons] * 2)
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


def _accuracy(margins: Float[Tensor, "P"]) -> float:
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())
