"""Implicit language Q-learning (ILQL; Snell et al. 2022, arXiv 2206.11871): offline Q-learning on
text whose rewards are known.

A state h is the text before a token, an action a the token. N is the number of tokens.
"""

from dataclasses import dataclass

from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Int, Tensor, torch


def expectile_loss(difference: Float[Tensor, "N"], tau: float) -> Float[Tensor, "N"]:
    """Return |τ − 1(u < 0)| u² of u = target − estimate (Kostrikov et al. 2021, implicit
    Q-learning, eq. 3). The estimate that minimises its mean is the τ-expectile of the targets:
    their mean at τ = ½, and nearer to their largest the larger τ is.

    u = 2 and −2 at τ = 0.7: 0.7 · 4 = 2.8 and 0.3 · 4 = 1.2.
    """
    return (tau - (difference < 0).to(difference.dtype)).abs() * difference.square()


def following(values: Float[Tensor, "N"], rows: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return the value after each token, which is that before the next token of the same row; 0
    after the last one. `rows` says which row each token is of; tokens are in the order of rows.

    Values 1 2 3 of the rows 0 0 1: 2 0 0.
    """
    return torch.where(is_last(rows), 0.0, values.roll(-1))


def is_last(rows: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
    """Return which tokens are the last ones of their rows."""
    return torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])[: len(rows)]


@dataclass(frozen=True)
class ActionValues:
    """What the models say of N tokens of the data, and their rewards."""

    logprobs: Float[Tensor, "N"]
    """log π_β(a | h) of the policy that imitates the data."""
    q: Float[Tensor, "N"]
    """Q(h, a)."""
    target_q: Float[Tensor, "N"]
    """The same by the target network, without a gradient."""
    q_logprobs: Float[Tensor, "N"]
    """log softmax(Q(h, ·)) at a."""
    values: Float[Tensor, "N"]
    """V(h)."""
    rewards: Float[Tensor, "N"]
    rows: Int[Tensor, "N"]
    """Which row each token is of, in rising order."""


@part
class Ilql:
    """The loss of ILQL, as terms for each token:

        lm    −log π_β(a | h)
        q     (r + γ V(h′) − Q(h, a))²          V(h′) without gradient, 0 at the end
        v     |τ − 1(u < 0)| u²,  u = Q̂(h, a) − V(h)
        cql   −log softmax(Q(h, ·))_a           (Kumar et al. 2020)

    weighted by 1, 1, 1 and `cql`. Q̂ is the target network, Q̂ ← (1 − ρ) Q̂ + ρ Q after each step
    with ρ = `polyak`. V estimates the best that the data does from h, not its mean, as far as τ is
    above ½; no action outside of the data is asked for its value.
    """

    tau: float = Field(
        default=0.7,
        ge=0.5,
        lt=1,
        description="The expectile that V is of the Q of the data's tokens: 0.5 is their mean, "
        "and near 1 the largest. Typical: 0.7 to 0.9.",
    )
    gamma: float = Field(
        default=0.99, ge=0, le=1, description="The discount for each token that follows."
    )
    cql: float = Field(
        default=0.1,
        ge=0,
        description="The weight of the term that holds Q of tokens down that the data does not "
        "have. It biases Q. Typical: 0.001 to 0.1.",
    )
    polyak: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="How far the target network moves towards Q in each optimizer step.",
    )

    def __call__(self, tokens: ActionValues) -> dict[str, Float[Tensor, "N"]]:
        """Return each term by name, weighted; their sum is the loss of each token."""
        targets = tokens.rewards + self.gamma * following(tokens.values.detach(), tokens.rows)
        return {
            "lm": -tokens.logprobs,
            "q": (targets - tokens.q).square(),
            "v": expectile_loss(tokens.target_q - tokens.values, self.tau),
            "cql": -self.cql * tokens.q_logprobs,
        }
