"""open-instruct: its losses for GRPO and the DPO family, from a checkout.

Its advantages are computed within the loop that prepares data, and of its GAE only tests make use.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_conformance import conventions
from rl_conformance.checkout import Checkout, FromCheckout
from rl_conformance.library import Pairs

RL, GRPO = "open_instruct.rl_utils", "open_instruct.grpo_utils"
MODEL, DPO = "open_instruct.model_utils", "open_instruct.dpo_utils"


class OpenInstruct(FromCheckout):
    name = "open-instruct"
    repository = "allenai/open-instruct"
    states: ClassVar[Mapping[str, str]] = {
        conventions.AS_K3: "GRPOExperimentConfig.kl_estimator; compute_grpo_loss, a comment"
    }

    def opened(self, folder: Path) -> Checkout:
        return Checkout(folder, (RL, GRPO, MODEL, DPO))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.means, self.grpo_utils = self.checkout.module(RL), self.checkout.module(GRPO)
        self.model, self.preferences = self.checkout.module(MODEL), self.checkout.module(DPO)

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        return self.model.log_softmax_and_gather(logits, ids)

    def _losses(
        self,
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        reference: Tensor | None,
        **own: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the policy loss and the KL of each token. The ratio is that of its trainer."""
        settings = {"loss_fn": self.grpo_utils.GRPOLossType.dapo, "clip_lower": 0.2}
        settings |= {"clip_higher": 0.2, "kl_estimator": 2}
        loss, _, kl = self.grpo_utils.compute_grpo_loss(
            logprobs,
            torch.exp(logprobs - old),
            advantages,
            reference,
            SimpleNamespace(**settings | own),
            torch.ones(logprobs.shape),
        )
        return loss, kl

    def _kl(self, logprobs: Tensor, reference: Tensor, old: Tensor, kind: int) -> Tensor:
        zeros = torch.zeros(logprobs.shape)
        return self._losses(logprobs, old, zeros, reference, kl_estimator=kind)[1]

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, logprobs.detach(), 0)

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, logprobs.detach(), 1)

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._kl(logprobs, ref_logprobs, logprobs.detach(), 2)

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """By the default of `kl_estimator`."""
        return self._kl(logprobs, ref_logprobs, old_logprobs, 2)

    # --- losses ---

    def _policy_loss(self, tokens: Sequence[Tensor], **settings: Any) -> Tensor:
        logprobs, old, advantages, mask = tokens
        return self.token_mean(self._losses(logprobs, old, advantages, None, **settings)[0], mask)

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        return self._policy_loss(tokens, clip_lower=low, clip_higher=high)

    def cispo_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cap: float
    ) -> Tensor:
        tokens = (logprobs, old_logprobs, advantages, mask)
        kind = self.grpo_utils.GRPOLossType.cispo
        return self._policy_loss(tokens, loss_fn=kind, clip_higher=cap - 1)

    # --- means ---

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        return self.means.masked_mean(loss, mask)

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        total = torch.stack([mask.sum() for mask in masks]).sum()
        pieces = zip(losses, masks, strict=True)
        return torch.stack([self.means.masked_mean(*each, None, total) for each in pieces]).sum()

    # --- comparisons ---

    def _dpo(self, pairs: Pairs, beta: float, **more: Any) -> Tensor:
        given = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
        return self.preferences.dpo_loss(*given, beta, **more)[0].mean()

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        return self._dpo(pairs, beta)

    def cdpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        return self._dpo(pairs, beta, label_smoothing=smoothing)

    def simpo(self, pairs: Pairs, beta: float, gamma: float) -> Tensor:
        means = (pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens)
        return self.preferences.simpo_loss(*means, beta, gamma / beta)[0].mean()
