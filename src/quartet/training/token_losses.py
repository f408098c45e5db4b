"""A loss per response token, and its mean over the rows of one optimizer step: what supervised
fine-tuning, PTX and a user's own stage minimise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quartet.data.records import Demonstration
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.models.adapters import LanguageModel
from quartet.models.forward import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.models.protocols import CausalModel
from quartet.models.routing import recorded_routing
from quartet.tensors import Bool, Float, Int, Tensor
from quartet.training.finite import check_finite
from quartet.training.load_balancing import LoadBalancing


@dataclass(frozen=True)
class RowTokens:
    """Some rows of an optimizer step as tensors, padded on the right. Entry t speaks of token t,
    and is 0 outside the response tokens."""

    rows: Sequence[int]
    """The places of these rows among all of the step, [b]."""
    mask: Bool[Tensor, "b t"]
    """Which tokens are learnt from: those of the responses that the policy, or the author of the
    demonstration, wrote."""
    logprobs: Float[Tensor, "b t"]
    """The policy's log-probs of the tokens, with a gradient."""
    ref_logprobs: Float[Tensor, "b t"] | None = None
    """Those of the reference, where there is one."""

    def of(self, values: Any) -> Float[Tensor, "b _"]:
        """Return what belongs to these rows, on their device: of a number for each row of the step,
        [B], one column, [b 1]; of numbers for each token, [B T], as many as the log-probs have."""
        chosen = torch.as_tensor(values)[self.rows].to(self.logprobs.device)
        return chosen[:, None] if chosen.ndim == 1 else chosen[:, : self.logprobs.shape[1]]


def token_losses(
    model: CausalModel,
    batch: Sequence[Demonstration],
    loss: Callable[[RowTokens], Float[Tensor, "b t"]],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
    balancing: LoadBalancing | None = None,
    reference: LanguageModel | None = None,
    temperature: float = 1.0,
) -> Iterator[Float[Tensor, ""]]:
    """Yield the loss of each micro-batch. Their sum over all ranks is the mean of `loss` over the
    response tokens of the batch, and with `balancing` the load-balancing loss of a mixture of
    experts. `loss` returns 0 outside the mask."""
    num_tokens = sum(
        len(d.response_ids) if d.loss_mask is None else sum(d.loss_mask) for d in batch
    )
    lengths = [len(d.prompt_ids) + len(d.response_ids) for d in batch]
    for micro_batch in process_group.micro_batches(lengths, micro_batch_tokens):
        some = [batch[i] for i in micro_batch.rows]
        ids = [_ids(row) for row in some]
        tokens, _, mask = padded(some)
        ref_logprobs = None
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = masked_logprobs(reference, tokens, mask, temperature)
        with recorded_routing(model.base_model) as routers:
            logprobs = masked_logprobs(model, tokens, mask, temperature)
        own = mask.to(logprobs.device, non_blocking=True)
        losses = loss(RowTokens(micro_batch.rows, own, logprobs, ref_logprobs))
        check_finite("the loss", losses, [d.id for d in some], ids.__getitem__)
        total = micro_batch.counts * losses.sum() / num_tokens
        if balancing is not None:
            total = balancing.added_to(total, routers.routing, micro_batch.share_of(lengths))
        yield total


def padded(
    rows: Sequence[Demonstration],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B"], Bool[Tensor, "B T"]]:
    """Return the ids of rows, padded on the right, their lengths, and which of the tokens are
    learnt from."""
    tokens, lengths = right_pad([_ids(row) for row in rows])
    starts = torch.tensor([len(row.prompt_ids) for row in rows])
    mask = response_mask(starts, lengths, tokens.shape[1])
    for number, row in enumerate(rows):
        if row.loss_mask is not None:  # an environment wrote the other tokens of the response
            start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.loss_mask)
            mask[number, start:end] &= torch.tensor(row.loss_mask)
    return tokens, lengths, mask


def _ids(row: Demonstration) -> tuple[int, ...]:
    return (*row.prompt_ids, *row.response_ids)
