import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.algorithms.advantages import Gae, GroupMean, gae
from tests.world import ragged_batch


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_gae_by_hand():
    # rewards (0, 1), values (0.5, 0.6), γ = 1, λ = 0.5: δ₂ = 1 − 0.6 = 0.4, δ₁ = 0.6 − 0.5 = 0.1, A₁ = 0.1 + 0.5·0.4
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = gae(tensor([0, 1]), tensor([0.5, 0.6]), mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(result, tensor([0.3, 0.4]))


def test_padding_is_not_a_state():
    # The same row with a value and a reward behind its end: they must change nothing.
    mask = torch.tensor([[True, True, False]])
    result = gae(tensor([0, 1, 50]), tensor([0.5, 0.6, 70]), mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(result, tensor([0.3, 0.4, 0]))


def test_tokens_of_others_are_stepped_over():
    # A token in the middle that is not the policy's own: as if the row were (0, 1) with values (0.5, 0.6).
    mask = torch.tensor([[True, False, True]])
    result = gae(tensor([0, 9, 1]), tensor([0.5, 9, 0.6]), mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(result, tensor([0.3, 0, 0.4]))


def test_lambda_1_without_values_is_the_return_to_go():
    rewards = tensor([0.2, -1.0, 3.0, 0.5])
    result = gae(rewards, torch.zeros_like(rewards), torch.ones_like(rewards, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(result, rewards.flip(1).cumsum(1).flip(1))


def test_lambda_0_is_the_temporal_difference():
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    result = gae(rewards, values, torch.ones(3, 5, dtype=torch.bool), gamma=0.9, lam=0.0)
    torch.testing.assert_close(result, rewards + 0.9 * following - values)


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Straight from the paper, eq. 16: A_t = Σ_l (γλ)^l δ_{t+l}, as plain numbers."""
    deltas = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_against_plain_loops_on_ragged_batches(rows, gamma, lam):
    width = max(map(len, rows))
    pad = [[*row, *[(0.0, 0.0)] * (width - len(row))] for row in rows]
    rewards, values = tensor(*[[r for r, _ in row] for row in pad]), tensor(*[[v for _, v in row] for row in pad])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    result = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(rows):
        expected = loop_gae([r for r, _ in row], [v for _, v in row], gamma, lam)
        torch.testing.assert_close(result[i, : len(row)], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_returns_are_advantages_plus_values_taken_before_whitening():
    batch = ragged_batch([3, 1, 2], [1.0, 0.0, -1.0])
    rewards = torch.zeros_like(batch.old_logprobs)
    raw, returns = Gae(whiten=False)(rewards, batch)
    white, same_returns = Gae(whiten=True)(rewards, batch)
    torch.testing.assert_close(returns, torch.where(batch.response_mask, raw + batch.values, 0.0))
    torch.testing.assert_close(returns, same_returns)
    valid = white[batch.response_mask]
    assert valid.mean().abs() < 1e-9
    assert valid.var(correction=0) == pytest.approx(1, abs=1e-6)


def group_advantage(scores, **settings):
    batch = ragged_batch([1] * len(scores), scores, groups=[0] * len(scores))
    rewards = torch.where(batch.response_mask, batch.scores[:, None], 0.0)
    return GroupMean(**settings)(rewards, batch)[0][:, 1].tolist()


def test_group_mean_by_hand():
    # 1, 0, 0, 0: mean 0.25, sample std 0.5: (1 − 0.25) / 0.5 = 1.5, −0.5
    assert group_advantage([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantage([1.0, 0.0, 0.0, 0.0], divide_by_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_a_group_of_two_differs_by_root_two():
    assert group_advantage([0.3, 0.9]) == pytest.approx([-0.70711, 0.70711], abs=1e-4)


@pytest.mark.parametrize("score", [0.1, 1 / 3, -7.77, 1e-8, 1e8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_group_of_equals_has_no_advantage_at_all(score, size):
    batch = ragged_batch([2] * size, [score] * size, groups=[0] * size, dtype=torch.float32)
    rewards = torch.where(batch.response_mask, batch.scores[:, None] / 3, 0.0)
    assert GroupMean()(rewards, batch)[0].abs().max() == 0


def test_a_response_shares_one_advantage_among_its_tokens():
    batch = ragged_batch([3, 1], [1.0, 0.0], groups=[0, 0])
    rewards = torch.zeros_like(batch.old_logprobs)
    rewards[:, 1] = batch.scores
    advantages = GroupMean()(rewards, batch)[0]
    assert advantages[0, 1] == advantages[0, 2] == advantages[0, 3] > 0
    assert advantages[1, 2:].tolist() == [0, 0]
