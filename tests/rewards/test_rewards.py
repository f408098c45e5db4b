import dataclasses

import pytest
import torch

from quartet.models.heads import ScalarModel
from quartet.models.padding import right_pad
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.verifiable import ExactMatch
from tests.support.world import model, prompts, rollout


def rollouts():
    return [rollout(prompt, (5 + i, 6, 7)[: 1 + i], 0.0, i) for i, prompt in enumerate(prompts(3))]


def test_a_model_scores_prompt_and_response_together_whatever_the_micro_batch():
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    expected = [
        scalar.scores(*right_pad([(*r.prompt.ids, *r.response_ids)])).item() for r in rollouts()
    ]
    for tokens in (1, 4096):
        assert ModelReward(scalar, tokens).score(rollouts()) == pytest.approx(expected, abs=1e-6)


def test_exact_match_ignores_white_space_around_the_answer_and_nothing_else():
    one = rollouts()[0]
    asked = dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, extra={"answer": 44}))
    answers = [dataclasses.replace(asked, response=text) for text in (" 44\n", "44.", "4 4", "")]
    assert ExactMatch().score(answers) == [1, 0, 0, 0]


def test_scores_are_weighted_sums_and_each_part_stays_visible():
    parts = [
        Weighted(TextReward("length", lambda prompt, response: 3.0), 0.5),
        Weighted(TextReward("constant", lambda prompt, response: 1.0), 2.0),
    ]
    made = rewarded(rollouts(), parts)[0]
    assert made.score == 3.5 and made.components == {"length": 3.0, "constant": 1.0}


def test_a_reward_that_returns_the_wrong_number_of_values_is_named():
    class Short:
        name = "rewards.py:brevity"

        def score(self, rollouts):
            return [1.0]

    with pytest.raises(RewardError) as error:
        rewarded(rollouts(), [Weighted(Short())])
    assert str(error.value) == (
        "reward rewards.py:brevity returned 1 value for 3 responses. Return a list of 3 numbers."
    )


def test_the_centre_is_taken_off():
    scalar = ScalarModel.from_trunk(model(), 0, seed=0)
    before = torch.tensor(ModelReward(scalar, 4096).score(rollouts()))
    scalar.centre = 1.25
    torch.testing.assert_close(
        torch.tensor(ModelReward(scalar, 4096).score(rollouts())), before - 1.25
    )


def test_scores_that_are_no_numbers_are_logged_a_few_times_and_counted(caplog):
    class Broken:
        name = "broken"

        def score(self, rollouts):
            return [float("nan"), None, *[1e300] * (len(rollouts) - 2)]

    many = [*rollouts(), *rollouts(), *rollouts()]
    made = rewarded(many, [Weighted(Broken())])
    assert len(many) >= 6 and all(each.score is None for each in made)
    assert len(caplog.messages) == 4 and "gave nan for" in caplog.messages[0]
    assert f"no finite number for {len(many) - 1 - 3} more responses" in caplog.messages[3]
