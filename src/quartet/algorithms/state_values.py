"""Advantages from Monte Carlo values: the mean score of continuations from states within a
response, in place of a critic (VinePPO, Kazemnejad et al. 2024, arXiv 2410.01679)."""

from collections.abc import Sequence
from typing import Literal

from quartet.algorithms.advantages import Advantage
from quartet.algorithms.masked import masked
from quartet.experience import Batch
from quartet.parts import Field
from quartet.tensors import Bool, Float, Tensor, torch


def state_advantages(
    token_rewards: Float[Tensor, "B T"],
    state_values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Return A = Σ r + V(next state) − V(state) for the tokens from one state to the next, the same
    for all of them (Kazemnejad et al. 2024, eq. 7, with γ = 1).

    `state_values` has the value before each token that begins at a state, and NaN elsewhere. After
    the last token the value is 0. Tokens before the first state have no baseline, and get 0.

    Rewards (0, 0, 0, 1), values (0.5, NaN, 0.75, NaN): A = (0.25, 0.25, 0.25, 0.25), first 0.75 −
    0.5, then 1 − 0.75.
    """
    is_state = mask & ~state_values.isnan()
    rewards = masked(token_rewards, mask)
    value = rewards[:, 0] * 0  # of the state that is next, with the rewards on the way to it
    at_states = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        value = value + rewards[:, t]
        own = state_values[:, t].to(value.dtype)
        at_states[:, t] = torch.where(is_state[:, t], value - own, 0.0)
        value = torch.where(is_state[:, t], own, value)
    # Each token has the number of the last state up to it, from 1.
    last = is_state.long().cumsum(dim=1)
    by_number = torch.zeros_like(rewards).scatter_add(1, (last - 1).clamp(min=0), at_states)
    spread = by_number.gather(1, (last - 1).clamp(min=0))
    return masked(torch.where(last > 0, spread, 0.0), mask)


class MonteCarloValues(Advantage):
    """A = Σ r + V̂(next state) − V̂(state), where V̂ is the mean score of continuations that the
    policy samples from a state (VinePPO, Kazemnejad et al. 2024). Unbiased without a critic, at the
    price of the tokens that are sampled for it."""

    type: Literal["monte_carlo_values"] = "monte_carlo_values"
    continuations: int = Field(
        default=9, ge=1, description="Responses that are sampled from each state. The authors': 9."
    )
    every: int = Field(
        default=8,
        ge=1,
        description="Tokens from one state to the next, where there is no separator.",
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description='Text that ends a step, such as "\\n": states are after tokens that have it.',
    )

    @property
    def num_continuations(self) -> int:
        return self.continuations

    def states(self, texts: Sequence[str]) -> list[int]:
        """Return every place of the grid, or those after tokens with the separator."""
        if self.separator is None:
            return list(range(0, len(texts), self.every))
        ends = [i + 1 for i, text in enumerate(texts[:-1]) if self.separator in text]
        return [0, *ends] if texts else []

    def __call__(self, token_rewards: Float[Tensor, "B T"], batch: Batch) -> tuple[Tensor, None]:
        """Return the advantages [B T] and None: there is no critic."""
        assert batch.state_values is not None, "monte_carlo_values needs the values of states"
        return state_advantages(token_rewards, batch.state_values, batch.response_mask), None
