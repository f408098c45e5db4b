"""Advantages by a critic (how much better than expected each token was), and the returns that the
critic learns.

The critic's targets are V + an advantage with a λ of its own, `value_lam`: 0 gives the one-step
(TD) target, 1 the Monte Carlo return, anything between GAE's. Left out, it is the policy's λ.
Baselines that need no critic are in `baselines.py`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from quartet.algorithms.masked import masked, whiten
from quartet.experience import Batch
from quartet.parts import Family, Field, OrInf
from quartet.tensors import Bool, Float, Tensor, torch

GAMMA = "The discount of later rewards. Typical for text: 1."
LAM = "0 trusts the critic, 1 the sampled return. Typical: 0.95 to 1."
VALUE_LAM = (
    'λ of the critic\'s targets, or their name: "mc" is 1, "td" is 0, and "gae" the advantage\'s '
    "own."
)
VALUE_TARGETS = {"mc": 1.0, "td": 0.0, "gae": None}


def _by_name(value: Any) -> Any:
    """Return the λ of a target's name; anything else as it is."""
    if isinstance(value, str) and value.isalpha() and value not in VALUE_TARGETS:
        raise PydanticCustomError("value_target", 'must be a number, "mc", "td" or "gae"')
    return VALUE_TARGETS.get(value, value) if isinstance(value, str) else value


ValueLam = Annotated[float | None, BeforeValidator(_by_name)]
"""A λ of the critic's targets, which may be given by name; None: the advantage's own."""


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float | Float[Tensor, "B"] = 0.95,
    final_values: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16):

        δ_t = r_t + γ V_{t+1} − V_t          A_t = δ_t + γ λ A_{t+1}

    The value after the last token of the mask is 0, or `final_values`. Entries outside the mask are
    stepped over, as if they were not there: the recursion carries the next value and advantage
    across them, so that tokens which are not the policy's own (a tool's output) are part of the
    environment.

    Two tokens with rewards (0, 1), values (0.5, 0.6), γ = 1, λ = 0.5: δ = (0.1, 0.4), A = (0.1 +
    0.5·0.4, 0.4) = (0.3, 0.4).
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0]) if final_values is None else final_values
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


def n_step(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    n: int,
    gamma: float = 1.0,
    final_values: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Return A_t = r_t + γ r_{t+1} + … + γ^{n−1} r_{t+n−1} + γ^n V_{t+n} − V_t (Sutton & Barto, eq.
    7.1), over the tokens of the mask only. n = 1 is the TD error, n ≥ the number of tokens the
    Monte Carlo return less the value.

    Rewards (0, 0, 1), values (0.5, 0.6, 0.7), n = 2: A = (0 + 0 + 0.7 − 0.5, 0 + 1 − 0.6, 1 − 0.7)
    = (0.2, 0.4, 0.3).
    """
    order = torch.argsort(~mask, dim=1, stable=True)  # entries of the mask first, in their order
    width, n = mask.shape[1], min(n, mask.shape[1])
    ahead = torch.nn.functional.pad(masked(rewards, mask).gather(1, order), (0, n))
    value = torch.nn.functional.pad(masked(values, mask).gather(1, order), (0, n))
    left = (mask.sum(dim=1, keepdim=True) - torch.arange(width, device=mask.device)).clamp(min=0)
    after = torch.zeros_like(rewards[:, 0]) if final_values is None else final_values
    reached = torch.where(left > n, value[:, n:], after[:, None])
    total = gamma ** left.clamp(max=n).to(rewards.dtype) * reached - value[:, :width]
    for k in range(n):
        total = total + gamma**k * ahead[:, k : k + width]
    return masked(torch.zeros_like(rewards).scatter(1, order, total), mask)


def return_to_go(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """Return G_t = Σ_k γ^k r_{t+k}: GAE with λ = 1 and no critic. Rewards (0.1, 0, 1), γ = 0.5:
    (0.35, 0.5, 1)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def between_first_and_last(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return where a row is between the first and the last entry of its mask, these included."""
    begun = mask.cummax(dim=1).values
    return begun & mask.flip(1).cummax(dim=1).values.flip(1)


# --- parts with a critic ---


def critic_values(
    batch: Batch, bootstrap_truncated: bool
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B"] | None]:
    """Return the critic's values and, with `bootstrap_truncated`, those after the end of responses
    that were cut off (0 for the others), else None."""
    assert batch.values is not None, "this advantage needs a critic's values"
    if not bootstrap_truncated:
        return batch.values, None
    assert batch.final_values is not None, "bootstrapping needs the values after the last tokens"
    return batch.values, torch.where(batch.ended, 0.0, batch.final_values)


def _with_targets(
    advantages: Float[Tensor, "B T"],
    token_rewards: Float[Tensor, "B T"],
    batch: Batch,
    gamma: float,
    value_lam: float | None,
    bootstrap_truncated: bool,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return the advantages, and the critic's targets."""
    values, final = critic_values(batch, bootstrap_truncated)
    mask = batch.response_mask
    error = (
        advantages
        if value_lam is None
        else gae(token_rewards, values, mask, gamma, value_lam, final)
    )
    return advantages, masked(error + values, mask)


class Advantage(Family):
    """How much better each token was than expected. A subclass implements `__call__` and says what
    it needs."""

    needs_critic: ClassVar[bool] = False
    """Whether it reads `batch.values`."""
    needs_group: ClassVar[bool] = False
    """Whether it compares several responses to one prompt."""
    needs_greedy: ClassVar[bool] = False
    """Whether it reads `batch.greedy_scores`, the score of the greedy response to the same
    prompt."""

    @property
    def num_continuations(self) -> int:
        """How many continuations are sampled from each state of a response, whose mean score is in
        `batch.state_values`; 0 where it does not read them."""
        return 0

    def states(self, texts: Sequence[str]) -> list[int]:
        """Return the places of the states that continuations begin at, given the text of each token
        of a response: 0 is before the first token."""
        return [0] if texts else []

    @property
    def needs_final_values(self) -> bool:
        """Whether it reads `batch.final_values`, the value after the last token of a response that
        was cut off."""
        return False

    def __call__(
        self, token_rewards: Float[Tensor, "B T"], batch: Batch
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """Return the advantages, and the critic's targets (None where there is no critic)."""
        raise NotImplementedError


class Gae(Advantage):
    """Advantages by GAE with a critic. λ = 1 is Monte Carlo, λ = 0 the TD error.

    Between two turns of a response are tokens that an environment wrote, a tool's output. With
    `tool_tokens = "skipped"` the recursion goes from the last token of one turn to the first of the
    next (veRL, NeMo-RL). With "steps" each of them is a state of value 0 without a reward, as
    OpenRLHF counts them: an advantage is discounted by γ λ at each of them, and the last token of a
    turn is followed by the value 0.

    A token, a tool's token and a token with rewards (0, –, 1), values (0.5, –, 0.6), γ = 1, λ =
    0.5: (0.1 + 0.5·0.4, –, 0.4) = (0.3, –, 0.4) skipped; in steps the tool's δ is 0.6 − 0, so A =
    (0 − 0.5 + 0.5·(0.6 + 0.5·0.4), –, 0.4) = (−0.1, –, 0.4).
    """

    type: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    lam: float = Field(default=0.95, ge=0, le=1, description=LAM)
    value_lam: ValueLam = Field(default=None, ge=0, le=1, description=VALUE_LAM + " Default: lam.")
    bootstrap_truncated: bool = Field(
        default=False,
        description="True: a response that was cut off ends in the critic's value of its "
        "last state; False: in 0.",
    )
    tool_tokens: Literal["skipped", "steps"] = Field(
        default="skipped",
        description="What tokens of an environment between two turns are: no steps at all, or "
        "steps of value 0.",
    )
    needs_critic = True

    @property
    def needs_final_values(self) -> bool:
        return self.bootstrap_truncated

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the advantages and the critic's targets, both [B T]."""
        values, final = critic_values(batch, self.bootstrap_truncated)
        mask, is_step = batch.response_mask, batch.response_mask
        if self.tool_tokens == "steps":
            is_step = between_first_and_last(mask)
            token_rewards, values = masked(token_rewards, mask), masked(values, mask)

        def estimate(lam: float) -> Tensor:
            return masked(gae(token_rewards, values, is_step, self.gamma, lam, final), mask)

        advantages = estimate(self.lam)
        error = advantages if self.value_lam is None else estimate(self.value_lam)
        return advantages, masked(error + values, mask)


class LengthAdaptiveGae(Advantage):
    """GAE with λ = 1 − 1 / (alpha · l) for a response of l tokens (VAPO, Yue et al. 2025, eq. 8),
    so that the reward at the end reaches the first tokens of long responses too. The critic's
    targets are Monte Carlo returns.

    alpha = 0.05, l = 100: λ = 1 − 1/5 = 0.8. Short responses, where that is below 0, get λ = 0.
    """

    type: Literal["length_adaptive_gae"] = "length_adaptive_gae"
    alpha: float = Field(
        default=0.05,
        gt=0,
        description="How fast λ nears 1 with the length l of a response: λ = 1 − 1 / (alpha"
        " · l). Typical: 0.05.",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    value_lam: ValueLam = Field(default=1.0, ge=0, le=1, description=VALUE_LAM)
    bootstrap_truncated: bool = Field(
        default=False,
        description="True: a response that was cut off ends in the critic's value of its "
        "last state; False: in 0.",
    )
    needs_critic = True

    @property
    def needs_final_values(self) -> bool:
        return self.bootstrap_truncated

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        values, final = critic_values(batch, self.bootstrap_truncated)
        lengths = batch.response_mask.sum(dim=1).clamp(min=1).to(values.dtype)
        lam = (1 - 1 / (self.alpha * lengths)).clamp(min=0)
        advantages = gae(token_rewards, values, batch.response_mask, self.gamma, lam, final)
        return _with_targets(
            advantages, token_rewards, batch, self.gamma, self.value_lam, self.bootstrap_truncated
        )


class NStep(Advantage):
    """n sampled rewards, then the critic."""

    type: Literal["n_step"] = "n_step"
    n: int = Field(
        default=4,
        ge=1,
        description="1 is the TD error; the response's length or more is Monte Carlo.",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    value_lam: ValueLam = Field(
        default=None, ge=0, le=1, description=VALUE_LAM + " Default: n steps too."
    )
    bootstrap_truncated: bool = Field(
        default=False,
        description="True: a response that was cut off ends in the critic's value of its "
        "last state; False: in 0.",
    )
    needs_critic = True

    @property
    def needs_final_values(self) -> bool:
        return self.bootstrap_truncated

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        values, final = critic_values(batch, self.bootstrap_truncated)
        advantages = n_step(token_rewards, values, batch.response_mask, self.n, self.gamma, final)
        return _with_targets(
            advantages, token_rewards, batch, self.gamma, self.value_lam, self.bootstrap_truncated
        )


class MonteCarlo(Advantage):
    """A_t = G_t − V_t: the sampled return less the critic's value. Unbiased, of high variance."""

    type: Literal["monte_carlo"] = "monte_carlo"
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    needs_critic = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        return Gae(gamma=self.gamma, lam=1.0)(token_rewards, batch)


class TemporalDifference(Advantage):
    """A_t = r_t + γ V_{t+1} − V_t: one reward, then the critic. Of low variance, as biased as the
    critic."""

    type: Literal["temporal_difference"] = "temporal_difference"
    gamma: float = Field(default=1.0, ge=0, le=1, description=GAMMA)
    needs_critic = True

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, Tensor]:
        return Gae(gamma=self.gamma, lam=0.0)(token_rewards, batch)


# --- after the estimate ---


class Normalize(Family):
    """What is done to the advantages of all tokens of a step before they weigh the loss."""

    def __call__(
        self, advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Return the advantages that the actor learns from, [B T], from those of a whole step."""
        raise NotImplementedError


class AsEstimated(Normalize):
    """The advantages stay as they are."""

    type: Literal["none"] = "none"

    def __call__(
        self, advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        return advantages


class Whiten(Normalize):
    """(A − μ) / σ over all response tokens of the step, so that minibatches do not change it; then
    cut to ±clip (PPO-max: 0.5).

    OpenAI's code and its reproductions divide by the population's deviation, TRL, trlx and veRL by
    the sample's.
    """

    type: Literal["whiten"] = "whiten"
    deviation: Literal["population", "sample"] = Field(
        default="population",
        description='Which standard deviation divides: of the "population" (by n) or of the'
        ' "sample" (by n − 1).',
    )
    clip: OrInf = Field(
        default=float("inf"),
        gt=0,
        description="Whitened advantages are cut to ± this value; inf: not at all.",
    )

    def __call__(
        self, advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        return whiten(advantages, mask, sample=self.deviation == "sample").clamp(
            -self.clip, self.clip
        )
