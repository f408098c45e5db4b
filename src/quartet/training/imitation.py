"""The loss of demonstrations: what supervised fine-tuning minimises, and what PTX adds to the RL
loss."""

from collections.abc import Iterator, Sequence

from quartet.data.records import Demonstration
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.models.protocols import CausalModel
from quartet.tensors import Float, Tensor
from quartet.training.load_balancing import LoadBalancing
from quartet.training.token_losses import token_losses


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
    return token_losses(
        model, batch, lambda tokens: -tokens.logprobs, micro_batch_tokens, process_group, balancing
    )
