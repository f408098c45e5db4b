"""The reward model: which of two answers would a person prefer?"""

from collections.abc import Iterator, Sequence

import torch

from quartet.algorithms.preference import LastTokenLoss, PerTokenLoss, after_divergence, at
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.loops.progress import Progress
from quartet.models.heads import ScalarModel
from quartet.models.logprobs import under_own_token
from quartet.models.padding import micro_batches, response_mask, right_pad
from quartet.tensors import Float, Tensor
from quartet.training.descend import check_finite, descend
from quartet.training.optim import Optimizer


def reward_model(
    model: ScalarModel,
    comparisons: Sampler[Comparison],
    loss: LastTokenLoss | PerTokenLoss,
    optimizer: Optimizer,
    steps: int,
    micro_batch_tokens: int,
) -> Iterator[Progress]:
    """Minimise a Bradley–Terry loss on batches of comparisons."""
    for number in range(1, steps + 1):
        lr = optimizer.lr
        margins: list[Tensor] = []
        losses = _losses(model, comparisons.next(), loss, micro_batch_tokens, margins)
        metrics = descend(losses, {"reward_model": optimizer})
        seen = torch.cat(margins)
        yield Progress(number, {**metrics, "accuracy": _accuracy(seen), "margin": float(seen.mean()), "lr": lr})


@torch.no_grad()
def pair_accuracy(model: ScalarModel, comparisons: Sequence[Comparison], micro_batch_tokens: int) -> float:
    """The share of pairs whose chosen side scores higher at its last token; a tie counts half."""
    margins: list[Tensor] = []
    for _ in _losses(model, comparisons, LastTokenLoss(), micro_batch_tokens, margins):
        pass
    return _accuracy(torch.cat(margins))


def _losses(
    model: ScalarModel,
    batch: Sequence[Comparison],
    loss: LastTokenLoss | PerTokenLoss,
    micro_batch_tokens: int,
    margins: list[Tensor],
) -> Iterator[Float[Tensor, ""]]:
    """The loss of a batch in pieces that add up to it; the differences of scores seen on the way are appended to `margins`."""
    longest = [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in batch]
    for rows in micro_batches(longest, micro_batch_tokens):
        piece = [batch[i] for i in rows]
        # Both sides go through the model in one batch.
        sides = [(*c.prompt_ids, *c.chosen_ids) for c in piece] + [(*c.prompt_ids, *c.rejected_ids) for c in piece]
        tokens, lengths = right_pad(sides, next(model.parameters()).device)
        (these, those), (good, bad) = tokens.chunk(2), lengths.chunk(2)
        differs = after_divergence(these, those, good, bad)
        asked = response_mask(lengths - 1, lengths, tokens.shape[1])
        if loss.needs_every_token:
            asked |= differs.repeat(2, 1) & response_mask(torch.zeros_like(lengths), lengths, tokens.shape[1])
        outputs = under_own_token(model(tokens, asked), asked)
        chosen, rejected = outputs.chunk(2)
        scores = at(chosen, good), at(rejected, bad)
        check_finite("the score", torch.cat(scores), [c.id for c in piece] * 2)
        margins.append((scores[0] - scores[1]).detach())
        labelled = torch.tensor([c.margin for c in piece], device=outputs.device)
        yield loss(chosen, rejected, good, bad, differs, labelled).sum() / len(batch)


def _accuracy(margins: Float[Tensor, "P"]) -> float:
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())
