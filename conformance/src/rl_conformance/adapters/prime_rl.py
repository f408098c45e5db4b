"""prime-rl: log-probs, the mean of its losses, and GRPO's advantages, from a checkout.

Its policy loss has no clip: it masks tokens by differences of probabilities, so that claims about
PPO are not of it. It takes responses without padding.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rl_conformance.adapters.unpadded import unpadded
from rl_conformance.checkout import Checkout, FromCheckout

LOSS = "prime_rl.trainer.rl.loss"
GRPO, BASE = "prime_rl.orchestrator.algo.grpo", "prime_rl.orchestrator.algo.base"
ROUTING = "prime_rl.orchestrator.algo.routing"


def trace(score: float) -> Any:
    """Return a response of one token."""
    node = SimpleNamespace(mask=[True], token_ids=[0])
    agent = SimpleNamespace(trainable=True)
    return SimpleNamespace(reward=score, nodes=[node], agent=agent, has_error=False)


class PrimeRL(FromCheckout):
    name = "prime-rl"
    repository = "PrimeIntellect-ai/prime-rl"

    def opened(self, folder: Path) -> Checkout:
        return Checkout(folder, (LOSS, GRPO, BASE, ROUTING), root="src")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.losses, self.algorithms = self.checkout.module(LOSS), self.checkout.module(GRPO)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return self.losses.selective_log_softmax(logits, ids)

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        own = SimpleNamespace(length_penalty=None)
        traces = [trace(score) for score in scores.tolist()]
        for group in groups.unique():
            episode = [
                SimpleNamespace(traces=[traces[i]]) for i in (groups == group).nonzero().flatten()
            ]
            asyncio.run(self.algorithms.GRPOAlgorithm.score_group(own, episode))
        return torch.tensor([each.nodes[0].advantages[0] for each in traces])

    def _sum(self, loss: Tensor, mask: Tensor, count: int) -> Tensor:
        """Return what its cross-entropy gives for log-probs of −loss, divided by a number of
        tokens."""
        logprobs, weights = unpadded(-loss, mask), unpadded(mask.float(), mask)
        zeros = [torch.zeros_like(row) for row in weights]
        data = (logprobs, logprobs, None, zeros, unpadded(mask, mask), zeros, weights, None)
        return self.losses.compute_loss(*data, None, 1, count, 1)[0]

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self._sum(loss, mask, int(mask.sum()))

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        total = sum(int(mask.sum()) for mask in masks)
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self._sum(*each, total) for each in pieces]).sum()
