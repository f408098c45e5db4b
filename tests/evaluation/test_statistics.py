"""Intervals, tests, corrections, pass@k and maj@k: numbers worked by hand, and enumeration."""

import itertools
import math
import random

import numpy as np
import pytest

from quartet.evaluation import statistics
from quartet.evaluation.at_k import best_of, maj_at_k, pass_at_k
from quartet.evaluation.results import (
    Measured,
    cell,
    compare_evaluations,
    comparison,
    pairwise_in_both,
)
from quartet.evaluation.statistics import (
    Estimate,
    bca_levels,
    bootstrap_mean,
    holm,
    length_controlled,
    mean,
    perplexity,
    share_or_mean,
    sign_test,
    wilson,
)
from quartet.runs.evaluations import estimate


def test_the_bootstraps_interval_by_hand_is_further_out_on_the_side_of_the_long_tail():
    # Of 0, 0, 0, 0, 5 the mean of 5 draws is k of Bin(5, 1/5), with P(k ≤ 0 … 4) = 0.3277, 0.7373,
    # 0.9421, 0.9933, 0.9997. z₀ = Φ⁻¹(0.3277 + 0.4096 / 2) = 0.0815, a = 60 / (6 · 20^1.5) = 0.1118
    assert bca_levels(0.0815, 0.1118) == pytest.approx((0.0707, 0.9968), abs=1e-4)
    # so the ends are k = 0 and 4; those of the percentile interval, at 0.025 and 0.975, are 0 and 3
    assert bca_levels(0.0, 0.0) == pytest.approx((0.025, 0.975))
    assert bootstrap_mean([0.0, 0.0, 5.0, 0.0, 0.0]) == Estimate(1.0, 0.0, 4.0)


def test_the_bootstrap_of_one_row_of_equal_rows_and_of_the_same_rows_again():
    assert bootstrap_mean([2.0]) == Estimate(2.0, None, None)
    assert bootstrap_mean([0.25] * 7) == Estimate(0.25, 0.25, 0.25)
    one_is_the_mean = bootstrap_mean([1.0, 2.0, 3.0])
    assert one_is_the_mean.low < 2.0 < one_is_the_mean.high
    values = [float(np.sin(i)) for i in range(50)]
    assert bootstrap_mean(values) == bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    turned = bootstrap_mean([-v for v in values])
    assert turned.low == pytest.approx(-bootstrap_mean(values).high, abs=0.02)


def test_drawing_in_blocks_does_not_change_the_resamples(monkeypatch):
    values = [float(i % 7) for i in range(60)]
    whole = bootstrap_mean(values)
    monkeypatch.setattr(statistics, "BLOCK", 60 * 33)
    assert bootstrap_mean(values) == whole


@pytest.mark.parametrize(
    ("draw", "true", "least"),
    [
        (lambda rng: rng.normal(0.3, 1.0, 50), 0.3, 0.92),
        (lambda rng: (rng.random(50) < 0.5) * 1.0 - (rng.random(50) < 0.3), 0.2, 0.92),
        (lambda rng: rng.exponential(1.0, 50), 1.0, 0.91),
    ],
    ids=["normal", "right or wrong", "skewed"],
)
def test_the_bootstraps_interval_covers_the_true_difference(draw, true, least, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    covered = 0
    for seed in range(300):
        interval = bootstrap_mean(draw(np.random.default_rng(seed)).tolist(), seed)
        covered += interval.low <= true <= interval.high
    assert least <= covered / 300 <= 0.98


def test_wilsons_interval_by_hand_and_at_the_ends():
    # z² = 3.8415: centre (0.8 + 0.19207) / 1.38415, half √(0.016 + 0.0096036) · 1.95996 / 1.38415
    assert wilson(0.8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert wilson(0.8, 10).high == pytest.approx(0.9433, abs=1e-4)
    none, every = wilson(0.0, 20), wilson(1.0, 20)
    assert none.low == 0.0 and none.high == pytest.approx(3.8415 / 23.8415, abs=1e-4)
    assert every.high == 1.0 and every.low == pytest.approx(1 - none.high)


def test_a_mean_and_its_interval_by_hand():
    # deviations −2, 0, 2: s² = 4, s / √3 = 1.1547
    assert mean([1.0, 3.0, 5.0]).low == pytest.approx(3 - 1.95996 * 1.1547, abs=1e-3)
    # two are enough: s² = 2
    assert mean([1.0, 3.0]).high == pytest.approx(2 + 1.95996, abs=1e-3)


def test_zeros_and_ones_are_a_share_and_other_numbers_a_mean():
    assert share_or_mean([0.0, 1.0, 1.0, 0.0]) == wilson(0.5, 4)
    assert share_or_mean([0.0, 0.0]) == wilson(0.0, 2)
    assert share_or_mean([0.0, 1.0, 0.5]) == mean([0.0, 1.0, 0.5])


def test_one_row_has_no_interval():
    assert mean([2.0]) == Estimate(2.0, None, None)
    assert perplexity([2.0], [2]) == Estimate(math.exp(1.0), None, None)
    shown = cell(Measured("a", "s", "gold", [2.0]))
    assert estimate(shown) == "2" and (shown["low"], shown["high"]) == (None, None)


def test_an_accuracy_with_a_tie_stays_below_one():
    [low, high] = [
        cell(Measured("a", "s", "accuracy", [1.0] * 99 + [0.5], "choices"))[end]
        for end in ("low", "high")
    ]
    # Wilson for p = 0.995, n = 100: centre (0.995 + 0.0192073) / 1.0384146 = 0.976688,
    # half √(0.00004975 + 0.0000960366) · 1.95996 / 1.0384146 = 0.022790
    assert [low, high] == pytest.approx([0.953898, 0.999478], abs=1e-5)


def test_the_sign_test_is_the_binomial_sum_and_mcnemars_for_many():
    assert sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(5, 5) == 1.0 == sign_test(0, 0)
    assert sign_test(0, 6) == pytest.approx(2 / 64)
    # 600 against 450: (149 / √1050)² = 21.14 on one degree of freedom
    assert sign_test(600, 450) == pytest.approx(math.erfc(149 / math.sqrt(1050) / math.sqrt(2)))
    exact = 2 * sum(math.comb(1000, i) for i in range(461)) / 2**1000
    assert sign_test(540, 460) == pytest.approx(exact)


def test_holm_by_hand_keeps_the_order_of_the_p_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_judge_that_only_likes_length_wins_half_at_equal_length():
    rng = random.Random(0)
    longer = [rng.gauss(40, 50) for _ in range(500)]
    shares = [float(each > 0) for each in longer]
    assert sum(shares) / 500 > 0.75
    controlled = length_controlled(shares, longer)
    assert controlled.low < 0.5 < controlled.high and abs(controlled.value - 0.5) < 0.12


def test_a_judge_that_ignores_length_keeps_its_win_rate():
    rng = random.Random(1)
    longer = [rng.gauss(40, 50) for _ in range(2000)]
    shares = [float(rng.random() < 0.7) for _ in longer]
    controlled = length_controlled(shares, longer)
    assert controlled.low < 0.7 < controlled.high and controlled.high - controlled.low < 0.12
    # equal lengths: the share with the tie that is added, 70.5 of 101
    assert length_controlled([1.0] * 70 + [0.0] * 30, [0.0] * 100).value == pytest.approx(
        70.5 / 101, abs=1e-6
    )


def test_a_win_rate_at_equal_length_is_open_where_all_answers_are_equally_much_longer():
    # σ(θ + φ tanh 1): only the sum is known, not what it is at Δ = 0
    constant = length_controlled([1.0] * 70 + [0.0] * 30, [40.0] * 100)
    assert constant.low < 0.05 and constant.high > 0.95


def test_the_interval_at_equal_length_covers_one_half_for_a_judge_that_only_likes_length():
    covered = 0
    for seed in range(100):
        rng = random.Random(seed)
        longer = [rng.gauss(40, 50) for _ in range(100)]
        controlled = length_controlled([float(each > 0) for each in longer], longer)
        covered += controlled.low < 0.5 < controlled.high
    assert covered >= 95


def test_perplexity_by_hand():
    # 2 nats over 2 tokens and 4 over 4: e, without spread; then 3 over 2 and 1 over 2
    flat = perplexity([2.0, 4.0], [2, 4])
    assert flat.value == flat.low == flat.high == pytest.approx(math.e)
    # r = 1, residuals ±1: half = z · √(2 · 2 / 1) / 4
    assert math.log(perplexity([3.0, 1.0], [2, 2]).high) == pytest.approx(1 + 1.95996 / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("right", "n", "k"), [(1, 4, 2), (0, 4, 2), (3, 5, 3), (5, 5, 1), (2, 6, 4)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(right, n, k):
    draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(right, n, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def _by_enumeration(answers, scores, k):
    total = 0.0
    draws = list(itertools.combinations(range(len(answers)), k))
    for draw in draws:
        counts = {}
        for i in draw:
            if answers[i] is not None:
                counts.setdefault(answers[i], []).append(scores[i])
        if counts:
            most = max(map(len, counts.values()))
            tied = [each for each in counts.values() if len(each) == most]
            total += sum(each[0] for each in tied) / len(tied)
    return total / len(draws)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_maj_at_k_is_that_of_all_draws(k):
    answers = ["7", "7", "9", None, "9", "8", "7"]
    scores = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert maj_at_k(answers, scores, k) == pytest.approx(_by_enumeration(answers, scores, k))
    assert maj_at_k([None] * 3, [0.0] * 3, 2) == 0.0


def test_best_of_four_counts_a_tie_as_a_random_choice():
    assert best_of(2.0, [1.0, 0.0, 1.5]) == 1.0
    assert best_of(1.0, [2.0, 0.0, 0.0]) == 0.0
    assert best_of(1.0, [1.0, 1.0, 0.0]) == pytest.approx(1 / 3)
    assert best_of(1.0, [1.0]) == 0.5


def test_two_policies_are_compared_on_rows_that_both_have():
    after = Measured("b", "s", "gold", [1.0, 2.0, None, 0.0], lengths=[4.0] * 4)
    before = Measured("a", "s", "gold", [0.0, 2.0, 5.0, 1.0], lengths=[4.0] * 4)
    result = comparison(after, before, "a")
    assert [result[key] for key in ("n", "wins", "ties", "losses")] == [3, 1, 1, 1]
    assert result["mean_difference"]["value"] == 0.0 and result["win_rate"]["value"] == 0.5
    assert comparison(Measured("b", "s", "x", [None]), Measured("a", "s", "x", [1.0]), "a") is None


def test_differences_are_those_of_the_same_prompt_whatever_prompts_differ_by():
    hard, easy = [float(i % 10) for i in range(40)], [10.0 + i % 10 for i in range(40)]
    before = Measured("a", "s", "gold", [*hard, *easy], lengths=[50.0, 90.0] * 40)
    ahead = [v + 0.5 + 0.1 * (i % 3) for i, v in enumerate(before.values)]
    after = Measured("b", "s", "gold", ahead, lengths=[47.0, 87.0] * 40)
    result = comparison(after, before, "a")
    # 27 of +0.5, 27 of +0.6, 26 of +0.7: s / √80 = 0.0092, so ±0.018; unpaired it would be ±1.8
    gained = result["mean_difference"]
    assert gained["value"] == pytest.approx(0.59875)
    assert (gained["low"], gained["high"]) == pytest.approx((0.5808, 0.6167), abs=0.002)
    assert result["length_difference"]["value"] == -3.0 == result["length_difference"]["high"]


def test_a_judges_wins_have_a_difference_of_lengths_and_none_of_means():
    after = Measured("b", "s", "judge", [1.0, 0.0], is_pairwise=True, lengths=[5.0, 9.0])
    result = comparison(after, Measured("a", "s", "judge", [], lengths=[3.0, 3.0]), "a")
    assert result["mean_difference"] is None
    assert result["length_difference"] == {"value": 4.0, "low": 2.0, "high": 6.0}


def test_of_losses_the_lower_one_wins():
    after = Measured("b", "s", "perplexity", [1.0, 1.0], "texts", False, tokens=[3, 3])
    before = Measured("a", "s", "perplexity", [2.0, 3.0], "texts", False, tokens=[3, 3])
    assert comparison(after, before, "a")["wins"] == 2


def _evaluation(policy, keys, values, **facts):
    from dataclasses import asdict

    measured = asdict(Measured(policy, "s", "gold", values, lengths=[1.0] * len(keys), **facts))
    return {"items": {"s": {"keys": {"prompts": keys}, "measured": [measured]}}}


def test_two_evaluations_are_compared_on_their_common_rows_whatever_their_order():
    first = _evaluation("a", ["x", "y", "z"], [0.0, 1.0, 9.0])
    second = _evaluation("b", ["y", "x", "w"], [3.0, 0.0, 7.0])
    [result] = compare_evaluations(first, second)
    assert [result[key] for key in ("policy", "against", "n", "wins", "ties")] == [
        "b",
        "a",
        2,
        1,
        1,
    ]
    assert result["mean_difference"]["value"] == 1.0


def test_wins_over_a_policy_of_their_own_evaluation_are_not_compared_across_two():
    first = _evaluation("x", ["a", "b"], [1.0, 1.0], is_pairwise=True)
    second = _evaluation("y", ["a", "b"], [1.0, 1.0], is_pairwise=True)
    assert compare_evaluations(first, second) == []
    assert pairwise_in_both(first, second) == ["gold"]
