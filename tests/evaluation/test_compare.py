import dataclasses

import pytest

from quartet.evaluation.compare import compare
from tests.support.world import prompts, rollout


def answers(scores, texts):
    return [
        dataclasses.replace(rollout(prompt, (5,), score), response=text)
        for prompt, score, text in zip(prompts(len(scores)), scores, texts, strict=True)
    ]


def test_a_tie_is_half_a_win_and_gold_judges_where_there_is_one():
    before, after = answers([0.0, 0.0, 0.0], "abc"), answers([9.0, 9.0, 9.0], "bbb")
    # gold is the letter: a < b wins, b = b ties, c > b loses
    made = compare(
        before, after, [1.0, 2.0, 3.0], gold=lambda prompt, response: float(ord(response))
    )
    assert made.judge == "gold"
    assert made.win_rate.mean == pytest.approx(0.5)
    assert made.kl.mean == 2
    assert made.after["response/distinct"] == pytest.approx(1 / 3)
    assert (made.before["reward"], made.after["reward"]) == (0.0, 9.0)
    # "abc" are the numbers 97, 98, 99
    assert (made.before["gold"], made.after["gold"]) == (98.0, 98.0)


def test_without_gold_the_reward_judges():
    made = compare(answers([0.0, 1.0], "ab"), answers([1.0, 0.5], "ab"), [0.0, 0.0], gold=None)
    assert made.judge == "reward" and made.win_rate.mean == 0.5
    assert "gold" not in made.after


def test_what_has_no_score_is_left_out_and_samples_are_the_first_ones():
    before, after = answers([0.0, None, 1.0], "abc"), answers([1.0, 5.0, None], "def")
    made = compare(before, after, [0.5, 1.5, 4.0], gold=None, samples=2)
    assert made.prompts == 1 and made.win_rate.mean == 1.0
    assert made.kl.mean == 2.0, "of all answers"
    assert [(s["before"], s["after"]) for s in made.samples] == [("a", "d"), ("b", "e")]
