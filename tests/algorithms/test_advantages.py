import dataclasses

import pytest
import torch

from quartet.algorithms.advantages import (
    Gae,
    LengthAdaptiveGae,
    MonteCarlo,
    NStep,
    TemporalDifference,
    Whiten,
    gae,
    n_step,
)
from quartet.algorithms.baselines import (
    BestOfGroup,
    GreedyBaseline,
    GroupMean,
    LeaveOneOut,
    LengthWeightedBaseline,
    ReturnToGo,
)
from quartet.algorithms.rewards import at_last_token
from tests.support.world import ragged_batch


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
    result = gae(
        rewards,
        torch.zeros_like(rewards),
        torch.ones_like(rewards, dtype=torch.bool),
        gamma=1.0,
        lam=1.0,
    )
    torch.testing.assert_close(result, rewards.flip(1).cumsum(1).flip(1))


def test_lambda_0_is_the_temporal_difference():
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    result = gae(rewards, values, torch.ones(3, 5, dtype=torch.bool), gamma=0.9, lam=0.0)
    torch.testing.assert_close(result, rewards + 0.9 * following - values)


def test_returns_are_advantages_plus_values():
    batch = ragged_batch([3, 1, 2], [1.0, 0.0, -1.0])
    rewards = torch.zeros_like(batch.old_logprobs)
    raw, returns = Gae()(rewards, batch)
    torch.testing.assert_close(returns, torch.where(batch.response_mask, raw + batch.values, 0.0))


def group_advantage(scores, **settings):
    batch = ragged_batch([1] * len(scores), scores, groups=[0] * len(scores))
    rewards = torch.where(batch.response_mask, batch.scores[:, None], 0.0)
    return GroupMean(**settings)(rewards, batch)[0][:, 1].tolist()


def test_group_mean_by_hand():
    # 1, 0, 0, 0: mean 0.25, sample std 0.5: (1 − 0.25) / 0.5 = 1.5, −0.5
    assert group_advantage([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantage([1.0, 0.0, 0.0, 0.0], std="none") == [0.75, -0.25, -0.25, -0.25]


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


def test_whitened_advantages_have_mean_0_and_deviation_1_by_either_count():
    batch = ragged_batch([3, 1, 2], [1.0, 0.0, -1.0])
    for deviation, correction in (("population", 0), ("sample", 1)):
        valid = Whiten(deviation=deviation)(batch.values, batch.response_mask)[batch.response_mask]
        assert valid.mean().abs() < 1e-9
        assert valid.var(correction=correction) == pytest.approx(1, abs=1e-6)
    assert Whiten(clip=0.5)(batch.values, batch.response_mask).abs().max() == 0.5


def test_n_step_by_hand():
    # rewards (0, 0, 1), values (0.5, 0.6, 0.7), n = 2: (0 + 0 + 0.7 − 0.5, 0 + 1 − 0.6, 1 − 0.7)
    mask = torch.ones(1, 3, dtype=torch.bool)
    result = n_step(tensor([0, 0, 1]), tensor([0.5, 0.6, 0.7]), mask, n=2)
    torch.testing.assert_close(result, tensor([0.2, 0.4, 0.3]))


def test_n_step_steps_over_tokens_of_others():
    mask = torch.tensor([[True, False, True, True, False]])
    result = n_step(tensor([0, 9, 0, 1, 9]), tensor([0.5, 9, 0.6, 0.7, 9]), mask, n=2)
    torch.testing.assert_close(result, tensor([0.2, 0, 0.4, 0.3, 0]))


def three_estimates(batch, rewards):
    return (
        NStep(n=1)(rewards, batch)[0],
        NStep(n=100)(rewards, batch)[0],
        NStep(n=3)(rewards, batch)[0],
    )


def test_one_step_is_td_and_all_steps_are_monte_carlo():
    batch = ragged_batch([6, 1, 3], [1.0, 0.0, -1.0])
    rewards = torch.where(batch.response_mask, torch.randn_like(batch.values), 0.0)
    one, all_steps, _ = three_estimates(batch, rewards)
    torch.testing.assert_close(one, TemporalDifference()(rewards, batch)[0])
    torch.testing.assert_close(all_steps, MonteCarlo()(rewards, batch)[0])
    torch.testing.assert_close(one, Gae(lam=0.0)(rewards, batch)[0])
    torch.testing.assert_close(all_steps, Gae(lam=1.0)(rewards, batch)[0])


def test_targets_of_the_critic_have_a_lambda_of_their_own():
    batch = ragged_batch([6, 1, 3], [1.0, 0.0, -1.0])
    rewards = torch.where(batch.response_mask, torch.randn_like(batch.values), 0.0)
    to_go = ReturnToGo()(rewards, batch)[0]
    advantages, targets = Gae(lam=0.95, value_lam=1.0)(rewards, batch)
    torch.testing.assert_close(targets, to_go)  # Monte Carlo: the critic's own opinion cancels
    torch.testing.assert_close(advantages, Gae(lam=0.95)(rewards, batch)[0])
    _, td_targets = Gae(lam=0.95, value_lam=0.0)(rewards, batch)
    torch.testing.assert_close(td_targets, TemporalDifference()(rewards, batch)[1])


@pytest.mark.parametrize("part", [Gae, LengthAdaptiveGae, NStep])
@pytest.mark.parametrize(("name", "lam"), [("mc", 1.0), ("td", 0.0), ("gae", None)])
def test_targets_of_the_critic_have_names(part, name, lam):
    assert part(value_lam=name).value_lam == lam
    with pytest.raises(ValueError, match='must be a number, "mc", "td" or "gae"'):
        part(value_lam="montecarlo")


def test_the_value_after_a_response_that_was_cut_off_counts_only_if_asked():
    batch = ragged_batch([2, 2, 2], [0.0, 0.0, 0.0])  # the third was cut off
    zeros = torch.zeros_like(batch.values)
    plain, bootstrapped = (
        Gae(lam=1.0, bootstrap_truncated=b)(zeros, batch)[1] for b in (False, True)
    )
    torch.testing.assert_close(bootstrapped[:2], plain[:2])
    torch.testing.assert_close(bootstrapped[2, 1:], batch.final_values[2].expand(2))
    torch.testing.assert_close(NStep(n=9, bootstrap_truncated=True)(zeros, batch)[1], bootstrapped)
    torch.testing.assert_close(
        NStep(n=1, gamma=0.9, bootstrap_truncated=True)(zeros, batch)[1][2, 2],
        0.9 * batch.final_values[2],
    )


def test_length_adaptive_lambda_by_hand():
    # alpha = 0.5: a response of 4 tokens has λ = 1 − 1 / 2 = 0.5, one of 1 token λ = max(1 − 2, 0) = 0
    batch = ragged_batch([4, 1], [1.0, 0.0])
    rewards = torch.where(batch.response_mask, torch.randn_like(batch.values), 0.0)
    advantages, targets = LengthAdaptiveGae(alpha=0.5)(rewards, batch)
    torch.testing.assert_close(advantages[:1], Gae(lam=0.5)(rewards, batch)[0][:1])
    torch.testing.assert_close(advantages[1:], Gae(lam=0.0)(rewards, batch)[0][1:])
    torch.testing.assert_close(targets, ReturnToGo()(rewards, batch)[0])


def responses(scores, lengths, part):
    batch = ragged_batch(lengths, scores, groups=[0] * len(scores))
    rewards = torch.zeros_like(batch.values)
    rewards[:, 1] = batch.scores
    return part(rewards, batch)[0][:, 1].tolist()


def test_leave_one_out_by_hand():
    # 1 − (0 + 0 + 0) / 3 = 1; 0 − (1 + 0 + 0) / 3 = −1/3
    assert responses([1.0, 0.0, 0.0, 0.0], [1, 2, 3, 1], LeaveOneOut()) == pytest.approx(
        [1, -1 / 3, -1 / 3, -1 / 3]
    )
    assert responses([0.7], [2], LeaveOneOut()) == [0]


def test_leave_one_out_divided_by_the_deviation_of_the_others():
    # without the first all are equal: undivided; without another (1, 0, 0): mean 1/3, deviation √(1/3)
    divided = LeaveOneOut(std="others")
    assert responses([1.0, 0.0, 0.0, 0.0], [1, 2, 3, 1], divided) == pytest.approx(
        [1, *[-1 / 3 / (1 / 3) ** 0.5] * 3], abs=1e-5
    )
    # one other has no deviation
    assert responses([1.0, 0.5], [1, 1], divided) == pytest.approx([0.5, -0.5])
    assert responses([0.7], [2], divided) == [0]


def test_population_and_sample_deviation_differ_as_they_should():
    # 1, 0, 0, 0: the population's deviation is √3 / 4 = 0.433: 0.75 / 0.433 = 1.732
    assert responses([1.0, 0.0, 0.0, 0.0], [1] * 4, GroupMean(std="population"))[
        0
    ] == pytest.approx(3**0.5, abs=1e-4)


def test_the_best_of_a_group_is_imitated_and_no_other():
    best = BestOfGroup()
    assert responses([1.0, 0.0, 0.0, 0.0], [1, 2, 3, 1], best) == [4, 0, 0, 0]
    assert responses([1.0, 1.0, 0.0], [1, 2, 3], best) == [1.5, 1.5, 0]
    assert responses([-3.0, -2.0], [1, 1], best) == [0, 2]


def test_the_length_weighted_baseline_by_hand():
    # lengths 3 and 1, rewards 1 and 0: baseline (3 · 1 + 1 · 0) / 4 = 0.75
    assert responses([1.0, 0.0], [3, 1], LengthWeightedBaseline()) == pytest.approx([0.25, -0.75])


def test_with_equal_lengths_it_is_the_groups_mean():
    equal = responses([1.0, 0.2, -0.4], [2, 2, 2], LengthWeightedBaseline())
    assert equal == pytest.approx(responses([1.0, 0.2, -0.4], [2, 2, 2], GroupMean(std="none")))


def test_the_greedy_baseline_is_taken_off_every_return():
    batch = ragged_batch([3, 1], [1.0, 4.0])  # greedy scores 0.5 and 2
    rewards = torch.zeros_like(batch.values)
    rewards[0, 3], rewards[1, 1] = 1.0, 4.0
    assert GreedyBaseline()(rewards, batch)[0].tolist() == [[0, 0.5, 0.5, 0.5], [0, 2.0, 0, 0]]


@pytest.mark.parametrize(
    "part",
    [
        GroupMean(),
        GroupMean(std="none"),
        LeaveOneOut(),
        LeaveOneOut(std="others"),
        LengthWeightedBaseline(),
        BestOfGroup(),
    ],
)
@pytest.mark.parametrize("score", [0.1, 1 / 3, -7.77])
def test_equals_have_no_advantage_whatever_the_baseline(part, score):
    assert set(responses([score] * 7, [1, 2, 3, 4, 5, 6, 7], part)) == {0}


def test_a_response_without_tokens_counts_in_the_baseline_with_its_score():
    # scores +1 and −1, the second response is empty: the first is 2 better than the other, 1 better than their mean
    batch = ragged_batch([3, 0], [1.0, -1.0], groups=[0, 0])
    rewards = at_last_token(batch.scores, batch.response_mask)
    for part, expected in ((LeaveOneOut(), 2.0), (GroupMean(std="none"), 1.0)):
        advantages, _ = part(rewards, batch)
        assert advantages[0, 1:].tolist() == [expected] * 3
        assert not advantages[1].any()


def test_tool_tokens_as_steps_of_value_0_by_hand():
    rewards, values = tensor([0.0, 9.0, 1.0, 9.0]), tensor([0.5, 9.0, 0.6, 9.0])
    mask = torch.tensor([[True, False, True, False]])
    batch = dataclasses.replace(ragged_batch([3], [0.0]), response_mask=mask, values=values)
    skipped, _ = Gae(lam=0.5)(rewards, batch)
    torch.testing.assert_close(skipped, tensor([0.3, 0.0, 0.4, 0.0]))
    counted, returns = Gae(lam=0.5, tool_tokens="steps")(rewards, batch)
    torch.testing.assert_close(counted, tensor([-0.1, 0.0, 0.4, 0.0]))
    torch.testing.assert_close(returns, tensor([0.4, 0.0, 1.0, 0.0]))
    _, own_targets = Gae(lam=0.5, value_lam=0.0, tool_tokens="steps")(rewards, batch)
    torch.testing.assert_close(own_targets, tensor([0.0, 0.0, 1.0, 0.0]))  # V + δ = 0.5 − 0.5
