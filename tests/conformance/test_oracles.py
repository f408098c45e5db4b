"""The plain loops against numbers worked by hand."""

import math

import pytest

from rl_conformance import oracles


def test_gae_of_two_tokens():
    """δ = (0 + 0.6 − 0.5, 1 − 0.6) = (0.1, 0.4); A = (0.1 + 0.5 · 0.4, 0.4)."""
    assert oracles.gae([0, 1], [0.5, 0.6], 1.0, 0.5) == pytest.approx([0.3, 0.4])


def test_gae_with_lambda_1_is_the_return_less_the_value():
    rewards, values = [1.0, -2.0, 3.0], [0.5, 0.25, 1.0]
    expected = [g - v for g, v in zip(oracles.returns(rewards, 0.9), values, strict=True)]
    assert oracles.gae(rewards, values, 0.9, 1.0) == pytest.approx(expected)


def test_returns():
    """1; 0 + 0.5 · 1; 0.1 + 0.5 · 0.5."""
    assert oracles.returns([0.1, 0, 1], 0.5) == pytest.approx([0.35, 0.5, 1])


def test_token_rewards():
    """−0.5 · (−1 + 2) = −0.5; −0.5 · (−3 + 2) + 4 = 4.5."""
    assert oracles.token_rewards(4, [-1, -3], [-2, -2], 0.5) == pytest.approx([-0.5, 4.5])


def test_whitening_of_three_numbers():
    """Mean 2; variance 2/3 of the population, 1 of the sample."""
    assert oracles.whiten([1, 2, 3]) == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert oracles.whiten([1, 2, 3], less=1) == pytest.approx([-1, 0, 1])


def test_groups_of_four():
    """(1, 0, 0, 0): mean 0.25, deviation 0.5 of the sample and 0.433 of the population."""
    scores, groups = [1, 0, 0, 0, 7, 9], [0, 0, 0, 0, 1, 1]
    assert oracles.grpo(scores, groups)[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert oracles.grpo(scores, groups, less=0)[:2] == pytest.approx(
        [math.sqrt(3), -1 / math.sqrt(3)]
    )
    assert oracles.grpo(scores, groups, eps=0.5)[0] == pytest.approx(0.75)
    assert oracles.dr_grpo(scores, groups) == pytest.approx([0.75, -0.25, -0.25, -0.25, -1, 1])
    assert oracles.rloo(scores, groups) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, -2, 2])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (0.5, 2, -1, -1),  # below, A > 0: −ρA
        (1.1, 2, -2.2, -2.2),
        (1.5, 2, -2.4, 0),  # above: clipped
        (0.5, -2, 1.6, 0),  # below, A < 0: clipped
        (1.1, -2, 2.2, 2.2),
        (1.5, -2, 3, 3),
    ],
)
def test_the_six_cases_of_ppo(ratio, advantage, loss, gradient):
    log_ratio = math.log(ratio)
    assert oracles.ppo(log_ratio, advantage, 0.2, 0.2) == pytest.approx(loss)
    assert oracles.ppo_gradient(log_ratio, advantage, 0.2, 0.2) == pytest.approx(gradient)
    if ratio < 1.5 or advantage > 0:
        assert oracles.dual_clip(log_ratio, advantage, 1.25) == pytest.approx(loss)
    else:
        assert oracles.dual_clip(log_ratio, advantage, 1.25) == pytest.approx(2.5)


def test_cispo():
    """ρ = 2, cap 1.5, A = 2, log π = −0.5: −1.5 · 2 · (−0.5) = 1.5, with the slope −3."""
    assert oracles.cispo(-0.5, math.log(2), 2, 1.5) == pytest.approx((1.5, -3))
    assert oracles.cispo(-0.5, 0, 2, 1.5) == pytest.approx((1, -2))


def test_the_clipped_value_loss():
    """V = 1, old 0, target 2: ½ max(1, (0.2 − 2)²)."""
    assert oracles.value(1, 0, 2, 0.2) == pytest.approx(1.62)
    assert oracles.value(0.1, 0, 2, 0.2) == pytest.approx(1.9**2 / 2)


def test_means_of_ragged_rows():
    rows = [[1, 2, 3], [], [6]]
    assert oracles.token_mean(rows) == 3
    assert oracles.sequence_mean(rows) == 4
    assert oracles.fixed_length_mean(rows, 2) == 2


def test_losses_of_pairs():
    """Log-ratios 2 and −1, β = 0.1: h = 0.3."""
    assert oracles.dpo(2, -1, 0.1) == pytest.approx(0.55435524)
    assert oracles.dpo(2, -1, 0.1, 0.5) == pytest.approx((0.55435524 + 0.85435524) / 2)
    assert oracles.ipo(2, -1, 0.1) == pytest.approx(4)
    good, bad = oracles.kto(2, -1, 0, 0.1)
    assert good + bad == pytest.approx(0.9251867)
    # p = 0.5 and 0.2: odds 1 and 0.25.
    assert oracles.orpo(math.log(0.5), math.log(0.2), 0.1) == pytest.approx(0.71546154)
    assert oracles.simpo(-1, -2, 2, 1) == pytest.approx(0.31326169)


def test_log_sigmoid_far_out():
    assert oracles.log_sigmoid(-200) == -200
    assert oracles.log_sigmoid(2) == pytest.approx(-math.log(1 + math.exp(-2)))


def test_log_softmax():
    assert oracles.log_softmax([0, math.log(3)]) == pytest.approx([math.log(0.25), math.log(0.75)])
    assert oracles.log_softmax([0, 1e4])[0] == -1e4
