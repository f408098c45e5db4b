"""The load-balancing loss of a mixture of experts: tokens should be spread over all experts.

A router that sends most tokens to a few experts trains these alone, and prefers them even more
afterwards. The loss makes that costly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quartet.tensors import Float, Tensor, torch


def load_balancing_loss(
    router_logits: Sequence[Float[Tensor, "N E"]], chosen: int, counts: Float[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Return E Σ_e f_e p_e for E experts, of which each token is sent to `chosen` (Fedus et al.
    2021, arXiv 2101.03961, eq. 4 to 6).

    f_e is how often expert e is among those of a token, and p_e the mean of its probability under
    the router's softmax; both are means over the tokens of all layers together, as in
    `load_balancing_loss_func` of transformers. `router_logits` are those of each layer, and
    `counts` how often each of the N tokens counts: 0 for padding. Only p has a gradient.

    It is `chosen` where both are even, and E where one expert has all tokens for certain. In one
    layer, with two tokens of probabilities (0.8, 0.2) and (0.6, 0.4) and one expert each, f is
    (1, 0) and p is (0.7, 0.3), so it is 2 × 0.7 = 1.4.
    """
    loads = expert_loads(router_logits, chosen, counts)
    probabilities = torch.stack(
        [(counts[:, None] * logits.float().softmax(-1)).sum(0) for logits in router_logits]
    )
    num_tokens = len(router_logits) * counts.sum()
    num_experts = loads.shape[1]
    return num_experts * ((loads.sum(0) / num_tokens) * (probabilities.sum(0) / num_tokens)).sum()


def expert_loads(
    router_logits: Sequence[Float[Tensor, "N E"]], chosen: int, counts: Float[Tensor, "N"]
) -> Float[Tensor, "L E"]:
    """Return how many tokens each layer sends to each expert."""
    weights = counts[:, None].expand(-1, chosen).flatten()
    # Sums of whole numbers, which are exact in any order.
    return torch.stack(
        [
            counts.new_zeros(logits.shape[-1]).index_add_(
                0, logits.detach().topk(chosen, dim=-1).indices.flatten(), weights
            )
            for logits in router_logits
        ]
    )


@dataclass(frozen=True)
class Routing:
    """What the routers of a model said of the tokens of one forward pass."""

    logits: tuple[Float[Tensor, "N E"], ...]
    """Those of each layer that has experts."""
    chosen: int
    """To how many experts a token is sent."""
    counts: Float[Tensor, "N"]
    """How many tokens of the rows each token of the pass stands for: 0 for padding, and more than 1
    for a prompt that several rows share."""

    def loss(self) -> Float[Tensor, ""]:
        return load_balancing_loss(self.logits, self.chosen, self.counts)

    def loads(self) -> Float[Tensor, "L E"]:
        return expert_loads(self.logits, self.chosen, self.counts)
