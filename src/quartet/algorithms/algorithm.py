"""An algorithm is a record of parts: how scores become token rewards, rewards advantages, and advantages a loss."""

from dataclasses import dataclass

from pydantic import model_validator

from quartet.algorithms.advantages import Gae, GroupMean
from quartet.algorithms.aggregation import SequenceMean, TokenMean
from quartet.algorithms.entropy import EntropyBonus
from quartet.algorithms.kl import KLInLoss, KLInReward, NoKL
from quartet.algorithms.masked import masked
from quartet.algorithms.policy_loss import Clip
from quartet.algorithms.rewards import LastToken
from quartet.algorithms.value_loss import ClippedValueLoss
from quartet.experience import Batch, Experience
from quartet.parts import Field, part
from quartet.tensors import Float, Tensor


@dataclass(frozen=True)
class Forward:
    """What the models being trained say now of the tokens of some experience. The entropy carries a gradient only where
    the algorithm asks for it."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None


@part
class Algorithm:
    """advantage × policy loss × KL placement × aggregation (× value loss × entropy).

    Everything else in Quartet asks the record what it needs and calls `experience` and `loss`; nothing asks its name.
    """

    advantage: Gae | GroupMean = Field(discriminator="type")
    kl: NoKL | KLInReward | KLInLoss = Field(discriminator="type")
    aggregation: TokenMean | SequenceMean = Field(discriminator="type")
    rewards: LastToken = LastToken()
    policy_loss: Clip = Clip()
    value_loss: ClippedValueLoss | None = None
    entropy: EntropyBonus = EntropyBonus()

    @model_validator(mode="after")
    def _composes(self) -> "Algorithm":
        if self.advantage.needs_critic and self.value_loss is None:
            raise ValueError(
                f"advantage.type = {self.advantage.type!r} uses a critic, and without value_loss nobody trains it. "
                'Add value_loss = { type = "clipped" }.'
            )
        return self

    @property
    def needs_critic(self) -> bool:
        return self.advantage.needs_critic

    @property
    def needs_reference(self) -> bool:
        return self.kl.needs_reference

    @property
    def needs_group(self) -> bool:
        """Whether advantages compare several responses to one prompt."""
        return self.advantage.needs_group

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.entropy.coef > 0

    def experience(self, batch: Batch) -> Experience:
        """Token rewards, advantages and returns of a batch. Pure: the same batch gives the same experience."""
        mask = batch.response_mask
        penalty = self.kl.reward(batch.old_logprobs, batch.ref_logprobs)
        token_rewards = masked(self.rewards(batch.scores, mask) + penalty, mask)
        advantages, returns = self.advantage(token_rewards, batch)
        return Experience(
            ids=batch.ids,
            tokens=batch.tokens,
            lengths=batch.lengths,
            response_mask=mask,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            token_rewards=token_rewards,
            advantages=advantages,
            values=batch.values,
            returns=returns,
        )

    def loss(self, experience: Experience, now: Forward, denominator: float) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss on these rows; their sum is what is minimised.

        `denominator` is `aggregation.denominator` of the mask of everything that feeds the optimizer step.
        """
        per_token = {
            "policy": self.policy_loss(now.logprobs, experience.old_logprobs, experience.advantages),
            "kl": self.kl.loss(now.logprobs, experience.ref_logprobs),
            "entropy": self.entropy(now.entropy),
        }
        if self.value_loss is not None and now.values is not None:
            assert experience.values is not None and experience.returns is not None
            per_token["value"] = self.value_loss(now.values, experience.values, experience.returns)
        mask = experience.response_mask
        return {name: self.aggregation(loss, mask, denominator) for name, loss in per_token.items()}
