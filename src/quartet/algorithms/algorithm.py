"""An algorithm is a record of parts: how scores become token rewards, rewards advantages, and
advantages a loss."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator

from quartet.algorithms.advantages import Advantage, AsEstimated, Normalize
from quartet.algorithms.aggregation import Aggregation
from quartet.algorithms.correction import Correction, NoCorrection
from quartet.algorithms.entropy import Entropy, EntropyBonus
from quartet.algorithms.groups import AllGroups, Groups
from quartet.algorithms.imitation import PositiveExamples, Pretraining
from quartet.algorithms.kl import KL, KLInLoss, KLInReward
from quartet.algorithms.load_balancing import Routing
from quartet.algorithms.masked import masked, masked_mean
from quartet.algorithms.policy_loss import Clip, PolicyLoss, Surrogate
from quartet.algorithms.rewards import LastToken, Rewards, ScoreShape, whiten_keeping_mean
from quartet.algorithms.update import ActorUpdate, FirstOrder
from quartet.algorithms.value_loss import NoValueLoss, ValueLoss
from quartet.errors import PartError
from quartet.experience import Batch, Experience
from quartet.parts import Field, of_shape, part
from quartet.tensors import Bool, Float, Tensor, torch


@dataclass(frozen=True)
class Forward:
    """The outputs of the models in training at the tokens of some experience: all of them, or those
    of the actor or the critic alone, which is None for the other. The entropy has a gradient only
    if the algorithm needs it."""

    logprobs: Float[Tensor, "B T"] | None = None
    entropy: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    exact_kl: Float[Tensor, "B T"] | None = None
    """KL(π ‖ π_ref) over the whole vocabulary, where the algorithm asks for it."""
    routing: Routing | None = None
    """What the actor's routers said, if it is a mixture of experts that is trained."""
    critic_routing: Routing | None = None

    @classmethod
    def joined(cls, passes: Iterable["Forward"]) -> "Forward":
        """Return the outputs of several forward passes as one."""
        found: dict[str, Any] = {}
        for each in passes:
            found |= {name: output for name, output in vars(each).items() if output is not None}
        return cls(**found)

    def within(self, mask: Bool[Tensor, "B T"]) -> "Forward":
        """Return these outputs with 0 outside the mask, where their gradient is 0, too."""

        def zeroed(numbers: Float[Tensor, "B T"] | None) -> Float[Tensor, "B T"] | None:
            return None if numbers is None else masked(numbers, mask)

        return Forward(
            zeroed(self.logprobs),
            zeroed(self.entropy),
            zeroed(self.values),
            zeroed(self.exact_kl),
        )


@part
class Algorithm:
    """scores → token rewards → advantage × policy loss × KL placement × aggregation (× value loss ×
    entropy × …).

    The rest of Quartet reads what an algorithm needs from the record and calls `experience`, `loss`
    and `adapt`; nothing depends on its name.
    """

    advantage: Advantage
    kl: KL
    aggregation: Aggregation
    scores: tuple[ScoreShape, ...] = ()
    rewards: Rewards = LastToken()
    normalize: Normalize = AsEstimated()
    policy_loss: PolicyLoss = Clip()
    correction: Correction = NoCorrection()
    value_loss: ValueLoss = NoValueLoss()
    entropy: Entropy = EntropyBonus()
    positives: PositiveExamples = PositiveExamples()
    ptx: Pretraining = Pretraining()
    groups: Groups = AllGroups()
    update: ActorUpdate = FirstOrder()
    mask_truncated: bool = Field(
        default=False,
        description="Responses that were cut off do not enter the actor's loss. They still count "
        "in baselines and teach the critic.",
    )

    @model_validator(mode="after")
    def _composes(self) -> "Algorithm":
        advantage = self.advantage.type
        if self.advantage.needs_critic and not self.value_loss.trains_critic:
            raise ValueError(
                f'advantage.type = "{advantage}" uses a critic, and no value_loss trains it. '
                'Add value_loss = { type = "clipped" }.'
            )
        if self.value_loss.trains_critic and not self.advantage.needs_critic:
            raise ValueError(
                f'value_loss.type = "{self.value_loss.type}" trains a critic that advantage.type = '
                f'"{advantage}" never reads. '
                'Use value_loss = { type = "none" }, or advantage = { type = "gae" }.'
            )
        if self.scores and not self.rewards.shapes_scores:
            raise ValueError(
                f'scores: shape the score of a response, and rewards.type = "{self.rewards.type}" '
                f"does not read it. "
                "Use scores = []."
            )
        for number, shape in enumerate(self.scores):
            if shape.type == "running_scale" and (number > 0 or self.rewards.needs_token_scores):
                raise ValueError(
                    'scores: type = "running_scale" keeps the moments of the scores as the reward '
                    "gave them. Put it first, and "
                    "use it with rewards that read one score per response."
                )
        if self.num_continuations and (
            self.scores or self.rewards != LastToken() or self.kl.changes_rewards
        ):
            raise ValueError(
                f'advantage.type = "{advantage}" compares scores as the reward gives them, and '
                "continuations have neither shaped scores nor a KL penalty. Use scores = [], "
                'rewards = { type = "last_token" }, and kl = { type = "in_loss" } or "none".'
            )
        if isinstance(self.kl, KLInLoss) and self.kl.baseline != "none":
            self._keeps_the_baseline_unbiased()
        if self.groups.max_rounds > 1 and not self.needs_group:
            raise ValueError(
                f'groups.type = "{self.groups.type}" drops groups of equal scores, and '
                f'advantage.type = "{advantage}" compares '
                'no groups. Use groups = { type = "all" }.'
            )
        return self

    def _keeps_the_baseline_unbiased(self) -> None:
        """Raise ValueError where the weight of a response depends on what the response says: the
        gradient of a baseline then has another expectation than 0."""
        if self.aggregation.type == "sequence_mean":
            raise ValueError(
                'kl.baseline: aggregation.type = "sequence_mean" divides the KL of a response by '
                "its length, and a baseline then changes the expected gradient. Use aggregation = "
                '{ type = "fixed_length" }.'
            )
        if self.mask_truncated:
            raise ValueError(
                "kl.baseline: mask_truncated leaves responses out by their length, and a baseline "
                "then changes the expected gradient. Use mask_truncated = false."
            )

    # --- what it needs ---

    @property
    def needs_critic(self) -> bool:
        """Whether advantages are estimated with values."""
        return self.advantage.needs_critic

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the reference are read."""
        return self.kl.needs_reference

    @property
    def needs_teacher(self) -> bool:
        """Whether each token learns from its own distance to the reference and from nothing that
        comes later (a discount of 0, no critic, no scores of tokens): the reference must then be
        another model."""
        if self.needs_critic or self.needs_token_scores or not isinstance(self.kl, KLInReward):
            return False
        return getattr(self.advantage, "gamma", 1.0) == 0

    @property
    def needs_group(self) -> bool:
        """Whether advantages compare several responses to one prompt."""
        return self.advantage.needs_group

    @property
    def needs_greedy(self) -> bool:
        """Whether advantages compare with the greedy response to the same prompt."""
        return self.advantage.needs_greedy

    @property
    def num_continuations(self) -> int:
        """How many continuations are sampled from each state within a response, whose mean score is
        its value; 0: none."""
        return self.advantage.num_continuations

    @property
    def needs_token_scores(self) -> bool:
        """Whether rewards must score each token of a response."""
        return self.rewards.needs_token_scores

    @property
    def needs_step_kl(self) -> bool:
        """Whether a coefficient follows how far a step went."""
        return self.policy_loss.needs_step_kl

    @property
    def needs_final_values(self) -> bool:
        """Whether the value after the last token of a response is read."""
        return self.advantage.needs_final_values

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss has a term on the entropy."""
        return self.entropy.coef > 0

    # --- what it does ---

    def token_rewards(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Return the reward of each token: the shaped score at its place, plus the KL penalty."""
        mask = batch.response_mask
        scores = self.rewards.score(batch)
        for shape in self.scores:
            scores = of_shape(shape, shape(scores, batch), scores.shape)
        placed = of_shape(self.rewards, self.rewards.place(scores, batch), mask.shape)
        rewards = masked(placed + self.penalties(batch), mask)
        return whiten_keeping_mean(rewards, mask) if self.rewards.whiten else rewards

    def clipped_scores(self, batch: Batch) -> Bool[Tensor, "B"]:
        """Return the responses whose score a shape cuts off at its limit."""
        scores = self.rewards.score(batch)
        clipped = torch.zeros_like(scores, dtype=torch.bool)
        for shape in self.scores:
            clipped = clipped | shape.clipped(scores)
            scores = shape(scores, batch)
        return clipped

    def penalties(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Return the KL penalty of each token, which is added to its reward."""
        penalties = self.kl.reward(batch.old_logprobs, batch.ref_logprobs, batch.exact_kl)
        mask = batch.response_mask
        return masked(of_shape(self.kl, penalties, mask.shape), mask)

    def experience(self, batch: Batch) -> Experience:
        """Return the token rewards, advantages and returns of a batch. The function is pure: the
        same batch gives the same experience."""
        mask = batch.response_mask
        token_rewards = self.token_rewards(batch)
        ref_logprobs = batch.ref_logprobs
        advantages, returns = _checked(self.advantage, self.advantage(token_rewards, batch), mask)
        return Experience(
            ids=batch.ids,
            tokens=batch.tokens,
            lengths=batch.lengths,
            response_mask=mask,
            old_logprobs=masked(batch.old_logprobs, mask),
            ref_logprobs=None if ref_logprobs is None else masked(ref_logprobs, mask),
            token_rewards=token_rewards,
            advantages=of_shape(self.normalize, self.normalize(advantages, mask), mask.shape),
            scores=batch.scores,
            values=None if batch.values is None else masked(batch.values, mask),
            returns=returns,
            penalties=self.penalties(batch),
            raw_advantages=advantages,
            weights=self.correction(batch.old_logprobs, batch.rollout_logprobs, mask),
            mean_entropy=None
            if batch.entropy is None
            else masked_mean(batch.entropy, mask).expand(len(mask)),
            kept=batch.kept,
            sampler_logprobs=masked(batch.rollout_logprobs, mask)
            if self.kl.reads_sampler
            else None,
            kl_baselines=self.kl.token_baselines(batch),
            is_learnt=batch.ended if self.mask_truncated else None,
        )

    def denominators(self, experience: Experience) -> dict[str, float]:
        """Return the divisor of each term of the loss, counted over everything that feeds one
        optimizer step."""
        return {
            name: self.aggregation.denominator(mask)
            for name, mask in self._masks(experience).items()
        }

    def loss(
        self, experience: Experience, now: Forward, denominators: Mapping[str, float]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the terms of the loss on these rows; their sum is minimised. Outputs of the actor
        alone have no term of the critic, and the other way round. `denominators` are those of the
        whole optimizer step, of which these rows may be a part.

        What the models say outside the response mask reaches no part: a sum over a row would carry
        a NaN from there to all its tokens, and 0 · NaN is a gradient of NaN.
        """
        now = now.within(experience.response_mask)
        shape = experience.response_mask.shape
        per_token = {}
        if now.logprobs is not None:
            assert now.entropy is not None, "every pass of an actor gives both"
            entropy = self.entropy(now.entropy, experience.mean_entropy)
            per_token = {
                "policy": self._policy(experience, now.logprobs),
                "kl": of_shape(self.kl, self._kl(experience, now.logprobs, now.exact_kl), shape),
                "entropy": of_shape(self.entropy, entropy, shape),
            }
            if self.positives.coef > 0:
                per_token["positives"] = self.positives(now.logprobs)
        if self.value_loss.trains_critic and now.values is not None:
            assert experience.values is not None and experience.returns is not None
            value = self.value_loss(now.values, experience.values, experience.returns)
            per_token["value"] = of_shape(self.value_loss, value, shape)
            if now.values.requires_grad and not per_token["value"].requires_grad:
                raise PartError(
                    f"{self.value_loss.type}: its loss has no gradient, so the critic would learn "
                    "nothing. Compute it from values, and do not detach them."
                )
        masks = self._masks(experience)
        return {
            name: self.aggregation(loss, masks[name], denominators[name])
            for name, loss in per_token.items()
        }

    def clipped(
        self, experience: Experience, logprobs: Float[Tensor, "B T"]
    ) -> Bool[Tensor, "B T"]:
        """Return the response tokens whose gradient the clip of the policy loss removes."""
        mask = experience.response_mask
        tokens = Surrogate(
            masked(logprobs, mask), experience.old_logprobs, experience.advantages, mask
        )
        return self.policy_loss.clipped(tokens) & mask

    def adapt(self, metrics: Mapping[str, float]) -> "Algorithm":
        """Return the algorithm of the next step, whose parts with state have taken in this step's
        metrics. All state of an algorithm is in the record."""
        return dataclasses.replace(
            self,
            scores=tuple(shape.adapt(metrics) for shape in self.scores),
            kl=self.kl.adapt(metrics),
            policy_loss=self.policy_loss.adapt(metrics),
        )

    def _policy(
        self, experience: Experience, logprobs: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        mask = experience.response_mask
        tokens = Surrogate(logprobs, experience.old_logprobs, experience.advantages, mask)
        loss: Tensor = of_shape(self.policy_loss, self.policy_loss(tokens), mask.shape)
        if logprobs.requires_grad and not loss.requires_grad:
            raise PartError(
                f"{self.policy_loss.type}: its loss has no gradient, so the policy would learn "
                "nothing. Compute it from tokens.logprobs or tokens.ratio, and do not detach them."
            )
        return loss if experience.weights is None else experience.weights * loss

    def _kl(
        self,
        experience: Experience,
        logprobs: Float[Tensor, "B T"],
        exact_kl: Float[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B T"]:
        sampler = experience.sampler_logprobs
        return self.kl.loss(
            logprobs,
            experience.old_logprobs if sampler is None else sampler,
            experience.ref_logprobs,
            exact_kl,
            experience.response_mask,
            experience.kl_baselines,
        )

    def _masks(self, experience: Experience) -> dict[str, Bool[Tensor, "B T"]]:
        """Return the tokens of each term of the loss. The actor's terms leave out responses that
        are not learnt (`mask_truncated`), as DAPO's overlong filtering does (Yu et al. 2025)."""
        mask = experience.response_mask
        actor = dict.fromkeys(("policy", "kl", "entropy"), mask)
        actor |= {"positives": self.positives.mask(experience)}
        if experience.is_learnt is not None:
            actor = {name: own & experience.is_learnt[:, None] for name, own in actor.items()}
        return actor | {"value": mask}


def _checked(
    part: Advantage, result: Any, mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
    """Return what a part of advantages has returned. Raises `PartError` if it is no pair of tensors
    of the response mask's shape, the second of which may be None."""
    expected = f"a pair (advantages, targets of the critic or None) of shape {list(mask.shape)}"
    if not isinstance(result, tuple) or len(result) != 2:
        raise PartError(f"{part.type}: returned a {type(result).__name__}, not {expected}.")
    for tensor in result:
        if tensor is not None and (not hasattr(tensor, "shape") or tensor.shape != mask.shape):
            shape = list(getattr(tensor, "shape", []))
            raise PartError(f"{part.type}: returned a tensor of shape {shape}, not {expected}.")
    return result
