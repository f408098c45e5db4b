"""The shares that responses win against their neighbours, by hand."""

import dataclasses

import pytest

from quartet.rewards.judge import JudgeReward, neighbours
from quartet.rewards.remote import Endpoint
from tests.support.world import prompts, rollout


@pytest.fixture
def judged(monkeypatch):
    """Scores by a judge whose texts a function of two responses gives, in the order it reads them."""
    endpoint = Endpoint("judge", "http://127.0.0.1:9/v1")

    def scores(rollouts, verdict):
        judge = JudgeReward("judge", endpoint, "m", "pairwise", "{prompt}|{first}|{second}", None)

        def asked(questions):
            return [verdict(*question.split("|")[1:]) for question in questions]

        monkeypatch.setattr(judge, "_ask", asked)
        return judge.score(rollouts)

    yield scores
    endpoint.close()


def responses(*groups):
    """Responses of each of several groups, each group of another prompt."""
    return [
        dataclasses.replace(rollout(prompt, (5,), 0.0, group), response=text)
        for group, (prompt, texts) in enumerate(zip(prompts(len(groups)), groups, strict=True))
        for text in texts
    ]


def longest(first, second):
    if len(first) == len(second):
        return "Better: tie"
    return "Better: A" if len(first) > len(second) else "Better: B"


def test_neighbours_are_a_ring_in_each_group():
    found = neighbours(responses("abcd", "e", "fg", "hij"))
    assert found == [(0, 1), (1, 2), (2, 3), (3, 0), (5, 6), (7, 8), (8, 9), (9, 7)]


def test_each_response_is_compared_with_its_neighbours_in_both_orders(judged):
    three, alone, two = ("a", "aaa", "aa"), ("aaaa",), ("bb", "aa")
    # a < aaa, aaa > aa, aa > a; no neighbour; a tie
    expected = [0.0, 1.0, 0.5, None, 0.5, 0.5]
    assert judged(responses(three, alone, two), longest) == expected
    of_four = judged(responses(("a", "aa", "aaa", "aaaa")), longest)
    assert of_four == [0.0, 0.5, 0.5, 1.0], "the first and the last are neighbours, too"


def test_a_judge_that_changes_its_mind_gives_a_tie_and_half_of_one_a_quarter(judged):
    pair = responses(("a", "aa"))
    assert judged(pair, lambda first, second: "Better: A") == [0.5, 0.5]

    def undecided(first, second):
        return "Better: tie" if first == "a" else "Better: A"

    assert judged(pair, undecided) == [0.25, 0.75]


def test_a_comparison_without_a_verdict_in_one_order_is_left_out(judged):
    def silent_about_a_first(first, second):
        return None if (first, second) == ("a", "aaa") else longest(first, second)

    # left: aaa > aa, aa > a
    found = judged(responses(("a", "aaa", "aa"), ("b", "bb")), silent_about_a_first)
    assert found == [0.0, 1.0, 0.5, 0.0, 1.0]
    assert judged(responses(("a", "b")), lambda first, second: "I do not know.") == [None, None]
