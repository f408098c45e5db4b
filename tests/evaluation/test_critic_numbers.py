"""The formulas of a critic's audit on a few states, by hand. What they say of a policy is in test_critic_audit.py."""

import math

import numpy as np
import pytest

from quartet.evaluation.critic_numbers import audit_numbers, t_quantile
from quartet.evaluation.critic_samples import LAMBDAS, Action, Samples, State
from quartet.evaluation.statistics import wilson

T1 = t_quantile(1)


def around(mean, half=0.0):
    """Two returns: of mean `mean`, variance 2 · half², and squared standard error half²."""
    return np.array([mean - half, mean + half])


def state(prompt, position, value, returns, *actions):
    return State(prompt, tuple(range(position)), 12, value, returns, list(actions))


def numbers(*states):
    return audit_numbers(Samples(list(states), 1.0, 0, 0, 0))


def interval(value, error):
    return {
        "value": pytest.approx(value),
        "low": pytest.approx(value - T1 * error),
        "high": pytest.approx(value + T1 * error),
    }


def errors_of_1_5_2_6():
    """Two states of two prompts each: V − V̂ is 1, 5, 2, 6, se² 1, ¼, 1, ¼."""
    return numbers(
        state(0, 0, 2.0, around(1.0, 1.0)),
        state(0, 3, 7.0, around(2.0, 0.5)),
        state(1, 0, 5.0, around(3.0, 1.0)),
        state(1, 2, 12.0, around(6.0, 0.5)),
    )


def test_the_level_and_the_root_mean_square_of_the_error():
    found = errors_of_1_5_2_6()
    assert (found["states"], found["prompts"]) == (4, 2)
    # Sums over prompts about 3.5 are −1 and 1: √(2 · 2) / 4.
    assert found["level"] == interval(3.5, 0.5)
    # (1 − 1, 25 − ¼, 4 − 1, 36 − ¼) = (0, 24.75, 3, 35.75), whose sums about 15.875 are ∓7
    squares = interval(15.875, math.sqrt(2 * 49 * 2) / 4)
    assert found["rmse"]["value"] == pytest.approx(math.sqrt(15.875))
    assert found["rmse"]["low"] == 0.0, "15.875 − 9.7 · 3.5 is negative"
    assert found["rmse"]["high"] ** 2 == squares["high"]


def test_the_error_of_each_range_of_positions():
    first, later = errors_of_1_5_2_6()["positions"]
    assert (first["first"], first["last"], first["states"]) == (0, 0, 2)
    assert (later["first"], later["last"], later["states"]) == (1, 3, 2)
    assert (first["value"], first["mean_return"]) == (3.5, 2.0)
    assert (later["value"], later["mean_return"]) == (9.5, 4.0)
    # Sums about the mean are ∓½: √(½ · 2) / 2.
    assert first["bias"] == interval(1.5, 0.5) and later["bias"] == interval(5.5, 0.5)
    assert first["rmse"]["value"] == pytest.approx(math.sqrt((0 + 3) / 2))
    assert later["rmse"]["value"] == pytest.approx(math.sqrt((24.75 + 35.75) / 2))
    assert first["deviation"] == pytest.approx(math.sqrt(2.0))
    assert later["deviation"] == pytest.approx(math.sqrt(0.5))


def test_the_parts_of_the_error_add_up():
    # level 3.5² − 0.5², position ½ ((1.5 − 3.5)² − ¼) + ½ ((5.5 − 3.5)² − ¼), and what is left
    assert errors_of_1_5_2_6()["parts"] == pytest.approx(
        {"total": 15.875, "level": 12.0, "position": 3.75, "rest": 0.125}
    )
    # Noise leaves none: errors of ±1 with se² 4.
    noisy = numbers(*(state(p, p, e, around(0.0, 2.0)) for p, e in ((0, 1.0), (1, -1.0))))
    assert noisy["parts"] == {"total": 0.0, "level": 0.0, "position": 0.0, "rest": 0.0}


def test_the_line_of_calibration_and_its_errors():
    # V = (1, 3, 1, 3), V̂ = (0, 2, 0, 6): slope 8 / 4, offset 2 − 2 · 2, residuals (0, −2, 0, 2).
    # Of the slope, the sums over prompts are ∓2: √(8 · 2) / 4. Of the offset, they are ±½.
    found = numbers(
        state(0, 0, 1.0, around(0.0)),
        state(0, 1, 3.0, around(2.0)),
        state(1, 0, 1.0, around(0.0)),
        state(1, 1, 3.0, around(6.0)),
    )["calibration"]
    assert found["slope"] == interval(2.0, 1.0)
    assert found["offset"] == interval(-2.0, 1.0)
    assert len(found["bins"]) == 1, "of four states or more"


def test_bins_of_calibration_hold_equally_many_states_in_the_order_of_their_values():
    order = (3, 0, 6, 1, 7, 2, 5, 4)
    found = numbers(*(state(v % 2, 0, float(v), around(2.0 * v + 1)) for v in order))
    assert [
        {**b, "mean_return": b["mean_return"]["value"]} for b in found["calibration"]["bins"]
    ] == [
        {"low": 0.0, "high": 3.0, "states": 4, "value": 1.5, "mean_return": 4.0},
        {"low": 4.0, "high": 7.0, "states": 4, "value": 5.5, "mean_return": 12.0},
    ]
    assert found["calibration"]["slope"]["value"] == pytest.approx(2.0)
    assert found["calibration"]["offset"]["value"] == pytest.approx(1.0)


def test_a_critic_of_one_value_has_no_line_and_one_prompt_no_interval():
    flat = numbers(*(state(p, 0, 1.0, around(float(p))) for p in range(2)))
    assert flat["calibration"]["slope"] is flat["calibration"]["offset"] is None
    alone = numbers(*(state(0, t, float(t), around(float(t))) for t in range(2)))
    for line in (alone["calibration"]["slope"], alone["calibration"]["offset"], alone["level"]):
        assert line["low"] is line["high"] is None


def test_how_far_the_value_follows_the_expected_return():
    # V̂ moves by ∓2 in both responses: 2² − ½ each, as se² = 1. V moves by ∓2, and by ∓½.
    found = numbers(
        state(0, 0, 3.0, around(1.0, 1.0)),
        state(0, 1, 7.0, around(5.0, 1.0)),
        state(1, 0, 1.0, around(0.0, 1.0)),
        state(1, 1, 2.0, around(4.0, 1.0)),
    )
    # (4 + 4 + 1 + 1) / (4 · 3.5); sums over prompts 8 − 5/7 · 7 and 2 − 5/7 · 7
    assert found["follows"] == interval(10 / 14, math.sqrt((9 + 9) * 2) / 14)


@pytest.mark.parametrize("moves", [(0.0, 0.0), (2.0, 0.0)], ids=["not", "not significantly"])
def test_nothing_is_followed_where_the_expected_return_does_not_move(moves):
    halves = [1.0 if move or not any(moves) else 0.0 for move in moves]
    states = [
        state(p, t, float(t), around(sign * moves[p], halves[p]))
        for p in range(2)
        for t, sign in ((0, -1), (1, 1))
    ]
    # (3.5, 3.5, 0, 0): 1.75 with a standard error of √(2 · 3.5² · 2) / 4 = 1.75
    assert numbers(*states)["follows"] is None


def test_the_variance_that_the_critic_explains():
    found = numbers(
        state(0, 0, 0.0, around(0.0, 1.0)),
        state(0, 3, 3.0, around(0.0, 0.5)),
        state(1, 0, 6.0, around(6.0, 1.0)),
        state(1, 2, 9.0, around(6.0, 0.5)),
    )["variance"]
    # of V̂ 12 − 0.625, of returns 1.25, of errors (0, 3, 0, 3) 3 − 0.625
    assert found == pytest.approx(
        {
            "of_expected_returns": 11.375,
            "of_single_returns": 1.25,
            "explained": 1 - (2.375 + 1.25) / 12.625,
            "possible": 11.375 / 12.625,
            "explained_of_expected": 1 - 2.375 / 11.375,
        }
    )


def test_where_returns_do_not_differ_there_is_no_variance_to_explain():
    noise = numbers(*(state(p, 0, 1.0, around(0.0, 1.0)) for p in range(2)))["variance"]
    # of V̂ 0 − 1, of returns 2, of errors 0 − 1
    assert noise == {
        "of_expected_returns": 0.0,
        "of_single_returns": 2.0,
        "explained": 0.0,
        "possible": 0.0,
        "explained_of_expected": None,
    }
    constant = numbers(*(state(p, 0, float(p), around(0.0)) for p in range(2)))["variance"]
    assert constant["explained"] is constant["possible"] is None


def test_states_are_right_within_196_hundredths_of_a_standard_error():
    found = numbers(
        state(0, 0, 1.95, around(0.0, 1.0)),
        state(0, 1, -3.9, around(0.0, 2.0)),
        state(1, 0, 1.97, around(0.0, 1.0)),
    )
    # variances 2 and 8
    assert found["where_right"] == {"states": 2, "deviation": pytest.approx(math.sqrt(5.0))}


def action(critic, returns, is_sampled=False, ends=False, advantages=None):
    if advantages is None:
        advantages = np.zeros((len(returns), len(LAMBDAS)))
    return Action(0, is_sampled, ends, critic, returns, advantages)


def test_pairs_of_next_tokens_are_ranked_where_their_returns_differ_significantly():
    # se² 1 each: a difference is clear above 1.96 · √2 = 2.77, and above 1.96 from a token that ends
    # the response, whose return is known. So 2.5 from a to c is not clear, and to d it is.
    a, b = action(0.0, around(1.0, 1.0)), action(5.0, around(10.0, 1.0))
    c, d = action(5.0, around(3.5, 1.0)), action(-1.0, np.array([3.5]), ends=True)
    other = state(1, 0, 0.0, around(0.0), a, action(2.0, around(10.0, 1.0)))
    found = numbers(state(0, 0, 0.0, around(0.0), a, b, c, d), other)["ranking"]
    assert found["pairs"] == 7
    # a < b right, a < d wrong, b > c a tie, b > d right; and a < b right in the other state
    assert found["clear"] == {**vars(wilson(3.5 / 5, 2)), "n": 5}
    assert found["open"] == {**vars(wilson(2.5 / 3, 2)), "n": 3}


def columns(first, *others):
    """The estimates of a token at each λ: of the first ones, and of all others."""
    return np.stack([first, *others, *[others[-1]] * (len(LAMBDAS) - 1 - len(others))], axis=1)


def test_bias_and_variance_of_advantages():
    # A* = 3 − 1 = 2 with se² 1 + 1, and 26 − 2 = 24 with se² 4 + 1.
    # At the first λ estimates are near, at the second they vary, and at all others they are far.
    estimates = columns(around(3.0, 1.0), around(2.0, 10.0), around(13.0, 1.0))
    first = action(0.0, around(3.0, 1.0), True, advantages=estimates)
    estimates = columns(around(26.0, 1.0), around(24.0, 10.0), around(36.0, 1.0))
    second = action(0.0, around(26.0, 2.0), True, advantages=estimates)
    left_out = action(0.0, around(50.0, 1.0))
    found = numbers(
        state(0, 0, 1.0, around(1.0, 1.0), first, left_out),
        state(1, 0, 3.0, around(2.0, 1.0), second),
    )["advantages"]
    assert found["units"] == 2
    # of (2, 24) 121, less (2 + 5) / 2
    assert found["true_deviation"] == pytest.approx(math.sqrt(117.5))
    row = found["by_lam"][0]
    # A − G is (0, 0) and (1, −1), of se² 0 and 1. The bias is 3 − 2 and 26 − 24, its square
    # 1 − 0 − 1 and 4 − 1 − 1. Without V: 0 + 1 and 0 + 3, squares 1 − 0 and 9 − 1.
    assert row["mean_bias"] == interval(1.5, 0.5)
    assert row["bias"]["value"] == pytest.approx(1.0)
    assert row["bias_of_returns"]["value"] == pytest.approx(math.sqrt(4.5))
    assert row["deviation"] == pytest.approx(math.sqrt(2.0))
    assert row["error"]["value"] == pytest.approx(math.sqrt((0 + 2 + 2 + 2) / 2))
    # covariance of (3, 26) and (2, 24) less what is shared, (2 / 2 + 4 / 2) / 2; variance of (3, 26)
    # and of single estimates within, 2 · ½
    assert row["correlation"] == pytest.approx((126.5 - 1.5) / math.sqrt((132.25 + 1) * 117.5))
    assert [row["is_best"] for row in found["by_lam"]] == [True] + [False] * 6


def test_a_token_that_ends_its_response_has_one_return_and_no_variance():
    states = [
        state(
            p,
            0,
            0.0,
            around(0.0),
            action(0.0, np.array([g]), True, True, columns(np.array([g + 1]), np.array([g]))),
        )
        for p, g in enumerate((1.0, 3.0))
    ]
    found = numbers(*states)["advantages"]
    assert found["true_deviation"] == 1.0 and found["by_lam"][0]["deviation"] == 0.0
    assert found["by_lam"][0]["mean_bias"]["value"] == 1.0
    assert all(row["correlation"] == pytest.approx(1.0) for row in found["by_lam"])
