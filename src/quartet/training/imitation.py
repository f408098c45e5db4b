"""The loss of demonstrations: what supervised fine-tuning minimises, and what PTX adds to the RL
loss."""

from collections.abc import Iterator, Sequence

import torch

from quartet.data.records import Demonstration
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.models.forward import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.models.protocols import CausalModel
from quartet.models.routing import recorded_routing
from quartet.tensors import Float, Tensor
from quartet.training.finite import check_finite
from quartet.training.load_balancing import LoadBalancing


def imitation_losses(
    model: CausalModel,
    batch: Sequence[Demonstration],
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
    balancing: LoadBalancing | None = None,
) -> Iterator[Float[Tensor, ""]]:
    """Yield the loss of each micro-batch. Their sum over all ranks is the mean negative
    log-probability per response token of the batch, and with `balancing` the load-balancing loss of
    a mixture of experts."""
    num_tokens = sum(
        len(d.response_ids) if d.loss_mask is None else sum(d.loss_mask) for d in batch
    )
    lengths = [len(d.prompt_ids) + len(d.response_ids) for d in batch]
    for micro_batch in process_group.micro_batches(lengths, micro_batch_tokens):
        with recorded_routing(model.base_model) as routers:
            losses = _negative_logprobs(model, [batch[i] for i in micro_batch.rows])
        loss = micro_batch.counts * losses.sum() / num_tokens
        if balancing is not None:
            loss = balancing.added_to(loss, routers.routing, micro_batch.share_of(lengths))
        yield loss


def _negative_logprobs(
    model: CausalModel, demonstrations: Sequence[Demonstration]
) -> Float[Tensor, "B T"]:
    """Return −log p of every response token, and 0 elsewhere."""
    tokens, lengths = right_pad([(*d.prompt_ids, *d.response_ids) for d in demonstrations])
    starts = torch.tensor([len(d.prompt_ids) for d in demonstrations])
    mask = response_mask(starts, lengths, tokens.shape[1])
    for row, d in enumerate(demonstrations):
        if d.loss_mask is not None:  # an environment wrote the other tokens of the response
            start, end = len(d.prompt_ids), len(d.prompt_ids) + len(d.loss_mask)
            mask[row, start:end] &= torch.tensor(d.loss_mask)
    losses = -masked_logprobs(model, tokens, mask)
    check_finite(
        "the loss",
        losses,
        [d.id for d in demonstrations],
        lambda row: tokens[row, : lengths[row]].tolist(),
    )
    return losses
