"""The unbiased estimate is the mean over all choices of n answers."""

import itertools
import math
import random
import statistics

import pytest

from quartet.evaluation.best_of_n import best_of_n


def test_it_is_the_mean_over_all_subsets():
    rng = random.Random(0)
    rewards = [[rng.gauss(0, 1) for _ in range(8)] for _ in range(3)]
    gold = [[rng.gauss(0, 1) for _ in range(8)] for _ in range(3)]
    made = {point.n: point for point in best_of_n(rewards, gold)}
    assert list(made) == [1, 2, 4, 8]
    for n, point in made.items():
        assert point.kl == pytest.approx(math.log(n) - (n - 1) / n)
        best, worth = [], []
        for r, g in zip(rewards, gold, strict=True):
            winners = [
                max(chosen, key=lambda i, r=r: r[i])
                for chosen in itertools.combinations(range(8), n)
            ]
            best.append(statistics.fmean(r[i] for i in winners))
            worth.append(statistics.fmean(g[i] for i in winners))
        assert point.reward == pytest.approx(statistics.fmean(best))
        assert point.gold == pytest.approx(statistics.fmean(worth))


def test_the_run_writes_the_curve_and_all_answers(ppo_run):
    curve = ppo_run.best_of_n
    assert [p["n"] for p in curve] == [1, 2, 4, 8, 16] and curve[0]["kl"] == 0
    assert curve == sorted(curve, key=lambda p: p["reward"])
    answers = list(ppo_run.answers())
    assert len(answers) == 8 and answers[0]["before"]["score"] is not None
    mean = statistics.fmean(a["after"]["score"] for a in answers)
    assert mean == pytest.approx(ppo_run.evaluation["after"]["reward"], abs=1e-4)
