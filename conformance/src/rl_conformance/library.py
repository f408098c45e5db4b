"""The common signature: what a library may offer, as functions of plain tensors.

B sequences, T tokens, V vocabulary, P pairs. A mask is bool [B T], True at the tokens that count.
Losses are scalars that an optimizer would minimise; what has a gradient is named. A library offers
what its adapter overrides; the rest raises `NotOffered` and is reported as "not offered".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class NotOffered(Exception):
    """The library has no such function, or no such option of it."""


@dataclass(frozen=True)
class Pairs:
    """Comparisons: sums of log-probs over whole responses, all [P], and the numbers of tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class Library:
    """One library, wrapped. An adapter overrides what the library has, by calls to it."""

    name: ClassVar[str] = ""
    version: str = ""
    states: ClassVar[Mapping[str, str]] = {}
    """Conventions that the library itself states, by name, and where it states them. Only a stated
    convention excuses a difference."""

    # --- log-probs and KL ---

    def token_logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return log p of each id [B T], from logits [B T V] that speak of the same position."""
        raise NotOffered

    def k1(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Return log π − log π_ref [B T]."""
        raise NotOffered

    def k2(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Return (log π − log π_ref)² / 2 [B T]."""
        raise NotOffered

    def k3(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Return π_ref / π − 1 − log(π_ref / π) [B T]."""
        raise NotOffered

    def kl_loss(self, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Return the KL term of each token's loss [B T], by the library's own default for KL in the
        loss, with a gradient to `logprobs`."""
        raise NotOffered

    # --- advantages ---

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns [B T], the advantages before any whitening if the library
        can give them."""
        raise NotOffered

    def token_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        """Return the reward of each token [B T]: −β (log π − log π_ref), and the score of a
        response [B] on its last token."""
        raise NotOffered

    def returns(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        """Return the discounted sum of the rewards from each token on [B T]."""
        raise NotOffered

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x [B T] with mean 0 and variance 1 over the mask."""
        raise NotOffered

    def grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        """Return (score − mean) / deviation of each response [B] within its group."""
        raise NotOffered

    def dr_grpo(self, scores: Tensor, groups: Tensor) -> Tensor:
        """Return score − mean of each response [B] within its group."""
        raise NotOffered

    def rloo(self, scores: Tensor, groups: Tensor) -> Tensor:
        """Return score − mean of the others of each response [B] within its group."""
        raise NotOffered

    def reinforce_pp(self, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        """Return the returns to go [B T], whitened over the mask."""
        raise NotOffered

    # --- losses ---

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """Return PPO's clipped loss, the mean over all tokens, with a gradient to `logprobs`."""
        raise NotOffered

    def dual_clip_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        cap: float,
    ) -> Tensor:
        """Return the same with low = high = 0.2 and no loss above −cap · A where A < 0."""
        raise NotOffered

    def cispo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        cap: float,
    ) -> Tensor:
        """Return CISPO's loss −sg[min(ρ, cap)] A log π, without a lower bound, the mean over all
        tokens."""
        raise NotOffered

    def gspo_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        """Return GSPO's loss: the clip acts on exp of the mean log-ratio of a response; mean over
        responses. `advantages` [B T] has one value per response."""
        raise NotOffered

    def value_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
    ) -> Tensor:
        """Return the clipped value loss, the mean over all tokens, with a gradient to `values`."""
        raise NotOffered

    # --- means ---

    def token_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of a loss [B T] over all tokens."""
        raise NotOffered

    def sequence_mean(self, loss: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over responses of the mean over their tokens."""
        raise NotOffered

    def fixed_length_mean(self, loss: Tensor, mask: Tensor, length: int) -> Tensor:
        """Return the sum over tokens / (B · length), as Dr. GRPO has it."""
        raise NotOffered

    def over_micro_batches(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Return the token mean whose gradient one optimizer step gets from these micro-batches,
        with the denominators that the library passes to them."""
        raise NotOffered

    def over_ranks(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Return the same for one micro-batch on each rank, where gradients are averaged over
        ranks."""
        raise NotOffered

    # --- comparisons ---

    def dpo(self, pairs: Pairs, beta: float) -> Tensor:
        """Return the mean of DPO's loss over pairs."""
        raise NotOffered

    def cdpo(self, pairs: Pairs, beta: float, smoothing: float) -> Tensor:
        """Return the mean of conservative DPO's loss over pairs."""
        raise NotOffered

    def ipo(self, pairs: Pairs, beta: float) -> Tensor:
        """Return the mean of IPO's loss over pairs."""
        raise NotOffered

    def kto(self, pairs: Pairs, kl: float, beta: float) -> Tensor:
        """Return KTO's loss, each pair as one desirable and one undesirable response, given the
        estimate of the KL; the mean over responses."""
        raise NotOffered

    def orpo(self, pairs: Pairs, weight: float) -> Tensor:
        """Return the mean of ORPO's loss over pairs, the NLL as mean per token of a response."""
        raise NotOffered

    def simpo(self, pairs: Pairs, beta: float, gamma: float) -> Tensor:
        """Return the mean of SimPO's loss over pairs."""
        raise NotOffered

    def bradley_terry(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the mean of −log σ(chosen − rejected) over pairs of scores [P]."""
        raise NotOffered


OPERATIONS: tuple[str, ...] = tuple(
    name for name, value in vars(Library).items() if callable(value) and not name.startswith("_")
)


def offers(library: Library) -> frozenset[str]:
    """Return the names of the operations that the adapter overrides."""
    return frozenset(
        name for name in OPERATIONS if getattr(type(library), name) is not getattr(Library, name)
    )


def same_per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return advantages [B] at every token [B T], 0 outside the mask: for adapters."""
    return advantages[:, None] * mask
