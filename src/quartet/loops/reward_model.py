"""The reward model: which of two answers would a person prefer?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from quartet.algorithms.preference import RewardModelLoss, after_divergence, last_token
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.loops.progress import Progress
from quartet.models.heads import ScalarModel
from quartet.models.logprobs import scatter_to_tokens
from quartet.models.padding import response_mask, right_pad
from quartet.tensors import Bool, Float, Int, Tensor
from quartet.training.budget import Budget
from quartet.training.finite import check_finite
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step


def reward_model(
    model: ScalarModel,
    comparisons: Sampler[Comparison],
    loss: RewardModelLoss,
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
) -> Iterator[Progress]:
    """Minimise a Bradley–Terry loss on batches of comparisons; the first steps may be done
    already."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within(
            "the update",
            partial(_step, model, comparisons.next(), loss, optimizer, budget.process_group),
        )
        yield Progress(number, {**metrics, "lr": lr})


def _step(
    model: ScalarModel,
    batch: Sequence[Comparison],
    loss: RewardModelLoss,
    optimizer: Optimizer,
    process_group: ProcessGroup,
    micro_batch_tokens: int,
) -> dict[str, float]:
    margins = torch.zeros(len(batch), dtype=torch.float64)
    metrics = optimizer_step(
        _losses(model, batch, loss, micro_batch_tokens, margins, process_group),
        {"reward_model": optimizer},
        process_group,
    )
    if "skipped" in metrics:
        return metrics
    process_group.all_reduce(margins)
    return {**metrics, "accuracy": accuracy_of(margins), "margin": float(margins.mean())}


@torch.no_grad()
def pair_scores(
    model: ScalarModel,
    comparisons: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Float[Tensor, "P 2"]:
    """What the chosen and the rejected side of each pair score, at their last tokens."""
    scores = torch.zeros(len(comparisons), 2)
    for piece in process_group.micro_batches(_lengths(comparisons), micro_batch_tokens):
        read = _read(model, [comparisons[i] for i in piece.rows])
        if piece.counts:
            scores[piece.rows] = torch.stack(
                [last_token(read.chosen, read.good), last_token(read.rejected, read.bad)], dim=1
            ).to(scores)
    process_group.all_reduce(scores)
    check_finite("the score", scores, [c.id for c in comparisons])
    return scores


def pair_accuracy(
    model: ScalarModel,
    comparisons: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> float:
    """The share of pairs whose chosen side scores higher at its last token; a tie counts half."""
    scores = pair_scores(model, comparisons, micro_batch_tokens, process_group)
    return accuracy_of(scores[:, 0] - scores[:, 1])


def _losses(
    model: ScalarModel,
    batch: Sequence[Comparison],
    loss: RewardModelLoss,
    micro_batch_tokens: int,
    margins: Float[Tensor, "P"],
    process_group: ProcessGroup,
) -> Iterator[Float[Tensor, ""]]:
    """The loss of a batch in pieces that add up to it over all ranks; the differences of scores
    seen on the way are written into `margins`."""
    for part in process_group.micro_batches(_lengths(batch), micro_batch_tokens):
        piece = [batch[i] for i in part.rows]
        read = _read(model, piece, loss.needs_every_token)
        scores = last_token(read.chosen, read.good), last_token(read.rejected, read.bad)
        check_finite(
            "the score", torch.cat(scores), [c.id for c in piece] * 2, partial(_said, piece)
        )
        if part.counts:
            margins[part.rows] = (scores[0] - scores[1]).detach().to(margins)
        labelled = torch.tensor([c.margin for c in piece], device=read.chosen.device)
        losses = loss(read.chosen, read.rejected, read.good, read.bad, read.differs, labelled)
        yield part.counts * losses.sum() / len(batch)


@dataclass(frozen=True)
class _Sides:
    """Outputs for both sides of some pairs, their lengths, and where the sides differ."""

    chosen: Float[Tensor, "P T"]
    rejected: Float[Tensor, "P T"]
    good: Int[Tensor, "P"]
    bad: Int[Tensor, "P"]
    differs: Bool[Tensor, "P T"]


def _read(model: ScalarModel, pairs: Sequence[Comparison], every_token: bool = False) -> _Sides:
    """Both sides go through the model in one batch."""
    sides = [(*c.prompt_ids, *c.chosen_ids) for c in pairs] + [
        (*c.prompt_ids, *c.rejected_ids) for c in pairs
    ]
    tokens, lengths = right_pad(sides, next(model.parameters()).device)
    (these, those), (good, bad) = tokens.chunk(2), lengths.chunk(2)
    differs = after_divergence(these, those, good, bad)
    asked = response_mask(lengths - 1, lengths, tokens.shape[1])
    if every_token:
        asked |= differs.repeat(2, 1) & response_mask(
            torch.zeros_like(lengths), lengths, tokens.shape[1]
        )
    chosen, rejected = scatter_to_tokens(model(tokens, asked), asked).chunk(2)
    return _Sides(chosen, rejected, good, bad, differs)


def _said(pairs: Sequence[Comparison], row: int) -> list[int]:
    """The chosen sides stand before the rejected."""
    pair = pairs[row % len(pairs)]
    return [*pair.prompt_ids, *(pair.chosen_ids if row < len(pairs) else pair.rejected_ids)]


def _lengths(pairs: Sequence[Comparison]) -> list[int]:
    return [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in pairs]


def accuracy_of(margins: Float[Tensor, "P"]) -> float:
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())
