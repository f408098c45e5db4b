"""Training a reward model on comparisons: which of two responses would a person prefer?"""

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
from quartet.models.routing import recorded_routing
from quartet.parts import of_shape
from quartet.tensors import Bool, Float, Int, Tensor
from quartet.training.budget import Budget
from quartet.training.finite import check_finite
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step, sum_of_losses


def reward_model(
    model: ScalarModel,
    comparisons: Sampler[Comparison],
    loss: RewardModelLoss,
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
    balance_coef: float = 0.0,
) -> Iterator[Progress]:
    """Yield the steps that follow the first `done` ones. Each minimises a Bradley–Terry loss on one
    batch of comparisons, and `balance_coef` times the load-balancing loss of a mixture of
    experts."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within(
            "the update",
            partial(
                _step,
                model,
                comparisons.next(),
                loss,
                optimizer,
                budget.process_group,
                balance_coef,
            ),
        )
        yield Progress(number, {**metrics, "lr": lr})


def _step(
    model: ScalarModel,
    batch: Sequence[Comparison],
    loss: RewardModelLoss,
    optimizer: Optimizer,
    process_group: ProcessGroup,
    balance_coef: float,
    micro_batch_tokens: int,
) -> dict[str, float]:
    margins = torch.zeros(len(batch), dtype=torch.float64)
    balancing = LoadBalancing(balance_coef)
    metrics = optimizer_step(
        _losses(model, batch, loss, micro_batch_tokens, margins, process_group, balancing),
        {"reward_model": optimizer},
        process_group,
    )
    if "skipped" in metrics:
        return metrics
    process_group.all_reduce(margins)
    metrics |= balancing.metrics(process_group)
    return {**metrics, "accuracy": accuracy_of(margins), "margin": float(margins.mean())}


@torch.no_grad()
def pair_scores(
    model: ScalarModel,
    comparisons: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Float[Tensor, "P 2"]:
    """Return the scores of the chosen and the rejected side of each pair, at their last tokens."""
    scores = torch.zeros(len(comparisons), 2)
    for micro_batch in process_group.micro_batches(_lengths(comparisons), micro_batch_tokens):
        sides = _forward(model, [comparisons[i] for i in micro_batch.rows])
        if micro_batch.counts:
            scores[micro_batch.rows] = torch.stack(_last_scores(sides), dim=1).to(scores)
    process_group.all_reduce(scores)
    check_finite("the score", scores, [c.id for c in comparisons])
    return scores


def pair_accuracy(
    model: ScalarModel,
    comparisons: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> float:
    """Return the share of pairs whose chosen side scores higher; a tie counts half."""
    scores = pair_scores(model, comparisons, micro_batch_tokens, process_group)
    return accuracy_of(scores[:, 0] - scores[:, 1])


@torch.no_grad()
def held_out_pairs(
    model: ScalarModel,
    comparisons: Sequence[Comparison],
    loss: RewardModelLoss,
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Return the `loss` and the `accuracy`, see `pair_accuracy`, on held-out comparisons."""
    margins = torch.zeros(len(comparisons), dtype=torch.float64)
    losses = _losses(model, comparisons, loss, micro_batch_tokens, margins, process_group)
    total = sum_of_losses(losses, process_group)
    process_group.all_reduce(margins)
    return {"loss": total, "accuracy": accuracy_of(margins)}


def _losses(
    model: ScalarModel,
    batch: Sequence[Comparison],
    loss: RewardModelLoss,
    micro_batch_tokens: int,
    margins: Float[Tensor, "P"],
    process_group: ProcessGroup,
    balancing: LoadBalancing | None = None,
) -> Iterator[Float[Tensor, ""]]:
    """Yield the loss of each micro-batch; their sum over all ranks is the loss of the batch. The
    score differences of this rank's pairs are written into `margins`."""
    tokens = [comparison.num_tokens for comparison in batch]
    for micro_batch in process_group.micro_batches(_lengths(batch), micro_batch_tokens):
        pairs = [batch[i] for i in micro_batch.rows]
        with recorded_routing(model.trunk) as routers:
            sides = _forward(model, pairs, loss.needs_every_token)
        scores = _last_scores(sides)
        check_finite(
            "the score", torch.cat(scores), [c.id for c in pairs] * 2, partial(_row_tokens, pairs)
        )
        if micro_batch.counts:
            margins[micro_batch.rows] = (scores[0] - scores[1]).detach().to(margins)
        losses = loss(
            sides.chosen,
            sides.rejected,
            sides.chosen_lengths,
            sides.rejected_lengths,
            sides.differs,
            torch.tensor([c.margin for c in pairs], device=sides.chosen.device),
        )
        total = micro_batch.counts * of_shape(loss, losses, [len(pairs)]).sum() / len(batch)
        if balancing is not None:
            total = balancing.added_to(total, routers.routing, micro_batch.share_of(tokens))
        yield total


@dataclass(frozen=True)
class _Sides:
    """The model's outputs for both sides of some pairs, the lengths of the sides, and the tokens
    after which they diverge."""

    chosen: Float[Tensor, "P T"]
    rejected: Float[Tensor, "P T"]
    chosen_lengths: Int[Tensor, "P"]
    rejected_lengths: Int[Tensor, "P"]
    differs: Bool[Tensor, "P T"]


def _forward(model: ScalarModel, pairs: Sequence[Comparison], every_token: bool = False) -> _Sides:
    """Return the outputs for some pairs; both sides go through the model in one batch."""
    sides = [(*c.prompt_ids, *c.chosen_ids) for c in pairs] + [
        (*c.prompt_ids, *c.rejected_ids) for c in pairs
    ]
    tokens, lengths = right_pad(sides)
    chosen, rejected = tokens.chunk(2)
    differs = after_divergence(chosen, rejected, *lengths.chunk(2))
    mask = response_mask(lengths - 1, lengths, tokens.shape[1])
    if every_token:
        mask |= differs.repeat(2, 1) & response_mask(
            torch.zeros_like(lengths), lengths, tokens.shape[1]
        )
    chosen, rejected = scatter_to_tokens(model(tokens, mask), mask).chunk(2)
    chosen_lengths, rejected_lengths = lengths.to(chosen.device).chunk(2)
    return _Sides(chosen, rejected, chosen_lengths, rejected_lengths, differs.to(chosen.device))


def _last_scores(sides: _Sides) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Return the scores of both sides, which stand at their last tokens."""
    return (
        last_token(sides.chosen, sides.chosen_lengths),
        last_token(sides.rejected, sides.rejected_lengths),
    )


def _row_tokens(pairs: Sequence[Comparison], row: int) -> list[int]:
    """Return the tokens of one side. The rows are first the chosen sides, then the rejected."""
    pair = pairs[row % len(pairs)]
    return [*pair.prompt_ids, *(pair.chosen_ids if row < len(pairs) else pair.rejected_ids)]


def _lengths(pairs: Sequence[Comparison]) -> list[int]:
    """Return the tokens that each pair takes in a batch, padding included."""
    return [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in pairs]


def accuracy_of(margins: Float[Tensor, "P"]) -> float:
    """Return the share of positive margins; 0 counts half."""
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def score_facts(
    scores: Float[Tensor, "P 2"], comparisons: Sequence[Comparison]
) -> dict[str, float]:
    """Return what the scores of the chosen and the rejected sides say of a reward model:

    - `accuracy`: the share of pairs whose chosen side scores higher; a tie counts half;
    - `confidence`: the accuracy that the score differences claim, the mean of σ(|difference|).
      Differences 2 and −1: (0.881 + 0.731) / 2 = 0.806;
    - `prefers_longer`: the share of pairs, of those with sides of different lengths, whose longer
      side scores higher.
    """
    margins = (scores[:, 0] - scores[:, 1]).double()
    facts = {"accuracy": accuracy_of(margins), "confidence": float(margins.abs().sigmoid().mean())}
    longer = torch.tensor([len(c.chosen_ids) - len(c.rejected_ids) for c in comparisons]).sign()
    by_length = (margins * longer)[longer != 0]
    return facts | ({"prefers_longer": accuracy_of(by_length)} if len(by_length) else {})
