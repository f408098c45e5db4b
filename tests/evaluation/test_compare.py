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


def test_without_gold_the_reward_judges():
    made = compare(answers([0.0, 1.0], "ab"), answers([1.0, 0.5], "ab"), [0.0, 0.0], gold=None)
    assert made.judge == "reward" and made.win_rate.mean == 0.5
    assert "gold" not in made.after
