"""A trial of a reward: its statistics and findings, by hand."""

import dataclasses
import math

import pytest

from quartet.evaluation.trial import findings, try_reward
from tests.support.world import prompts, rollout


class Given:
    """A reward that gives the scores it was made with."""

    name = "given"

    def __init__(self, *scores):
        self.scores = scores

    def score(self, rollouts):
        return list(self.scores)


def trial(*scores, texts=None, pairs=False):
    texts = texts or ["x"] * len(scores)
    [prompt] = prompts(1)
    answers = [dataclasses.replace(rollout(prompt, (5,), None), response=text) for text in texts]
    return try_reward(Given(*scores), answers, pairs)


def test_statistics_are_over_the_scores_that_are_numbers():
    found = trial(1.0, None, 3.0, math.nan, 8.0, math.inf, texts=["aaa", "", "a", "", "aa", ""])
    assert (found.answers, found.none, found.nan, found.different) == (6, 1, 2, 3)
    assert (found.least, found.most, found.mean) == (1.0, 8.0, 4.0)
    assert found.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 3))
    # lengths 3, 1, 2: deviations (1, −1, 0) · (−3, −1, 4) / √(2 · 26)
    assert found.length_correlation == pytest.approx(-2 / math.sqrt(52))
    assert found.accuracy is None
    assert found.examples == ((1.0, "aaa"), (3.0, "a"), (8.0, "aa"))
    nothing = trial(None, None)
    assert nothing.least is nothing.mean is nothing.deviation is nothing.length_correlation is None


def test_examples_are_the_two_lowest_and_the_two_highest():
    found = trial(5.0, 1.0, 4.0, 2.0, 3.0, texts=["e", "a", "d", "b", "c"])
    assert [text for _, text in found.examples] == ["a", "b", "d", "e"]
    assert len(trial(1.0, 2.0, 3.0).examples) == 3
    assert len(trial(1.0, 2.0, 3.0, 4.0).examples) == 4


def test_the_chosen_side_is_the_first_of_each_pair_and_a_tie_is_half():
    # won, tied, lost, and one pair without a number
    assert trial(2.0, 1.0, 1.0, 1.0, 0.0, 3.0, None, 1.0, pairs=True).accuracy == 0.5
    assert trial(2.0, 1.0, 1.0, 1.0, pairs=True).accuracy == 0.75
    assert trial(None, 1.0, pairs=True).accuracy is None


def test_findings_name_what_may_go_wrong():
    good = trial(1.0, 0.0, 1.0, 0.0, texts=["aa", "a", "a", "aa"], pairs=True)
    assert good.length_correlation == 0.0 and findings(good) == []
    [same] = findings(trial(1.0, 1.0))
    assert same.startswith("all answers got the same number") and findings(trial(1.0)) == []
    [none] = findings(trial(1.0, 2.0, None))
    assert none.startswith("1 of 3 answers got None")
    [nan] = findings(trial(1.0, 2.0, math.nan, math.inf))
    assert nan.startswith("2 of 4 scores are NaN or infinite")
    [longer] = findings(trial(1.0, 2.0, texts=["a", "aa"]))
    assert longer.startswith("longer answers score higher (r = 1.00)")
    [shorter] = findings(trial(2.0, 1.0, texts=["a", "aa"]))
    assert shorter.startswith("shorter answers score higher (r = -1.00)")
    # deviations (−1, 0, 1) · (−1, 2, −1): r = 0
    assert findings(trial(1.0, 2.0, 3.0, texts=["a", "aaaa", "a"])) == []
    [wrong] = findings(trial(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, pairs=True))
    assert wrong.startswith("the rejected side scores higher in 67% of comparisons")
