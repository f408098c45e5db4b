"""The metrics of one RL step of four tokens, by hand. What stands outside the mask is 7 or clipped, and enters none."""

import dataclasses
import math

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.experience import Batch, Experience
from quartet.training.metrics import (
    correlation,
    earned_correlation,
    most_common,
    rl_metrics,
    with_staleness,
)
from quartet.training.update import Update
from tests.support.world import prompts, ragged_batch, rollout

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])
OLD = (-1.0, -2.0, -1.0, -3.0)


def placed(*numbers, outside=7.0):
    """Numbers at the four response tokens, and another one outside."""
    return torch.full(MASK.shape, outside).masked_scatter(MASK, torch.tensor(numbers))


ROLLOUTS = [
    dataclasses.replace(rollout(prompts(1)[0], (5, 6, 7), 1.0), response="x"),
    dataclasses.replace(rollout(prompts(2)[1], (5,), 3.0), response="x"),
]
BATCH = Batch(
    ids=("a", "b"),
    tokens=torch.ones(2, 4, dtype=torch.long),
    lengths=torch.tensor([4, 2]),
    response_mask=MASK,
    scores=torch.tensor([1.0, 3.0]),
    ended=torch.tensor([True, True]),
    groups=torch.tensor([0, 1]),
    rollout_logprobs=placed(-1.0, -2.5, -1.0, -3.0, outside=-30.0),
    old_logprobs=placed(*OLD),
    ref_logprobs=placed(-1.5, -2.0, -1.0, -2.0, outside=0.0),
    entropy=placed(0.5, 1.0, 0.5, 2.0),
)
EXPERIENCE = Experience(
    ids=BATCH.ids,
    tokens=BATCH.tokens,
    lengths=BATCH.lengths,
    response_mask=MASK,
    old_logprobs=BATCH.old_logprobs,
    token_rewards=placed(0.0, 0.0, 1.0, 3.0),
    advantages=placed(1.0, -1.0, 2.0, 0.0),
    scores=BATCH.scores,
    values=placed(1.0, 2.0, 3.0, 2.0),
    returns=placed(1.0, 3.0, 3.0, 3.0, outside=-7.0),
    raw_advantages=placed(2.0, 4.0, 2.0, 4.0),
    weights=placed(0.0, 1.0, 1.0, 0.5, outside=0.0),
)
UPDATE = Update(
    losses={"policy": 0.25},
    step_stats={"grad_norm/actor": 2.0},
    clip_fraction=0.75,
    first_ratio_error=0.125,
    step_kl=None,
    logprobs=placed(-1.0 + math.log(2.0), -2.0, -1.0, -3.0 - math.log(2.0), outside=-9.0),
    entropy=placed(1.0, 1.0, 1.0, 3.0),
    clipped=placed(1.0, 1.0, 0.0, 1.0, outside=1.0).bool(),
    row_advantages=torch.tensor([2.0, 1.0]),
)


@pytest.fixture(scope="module")
def metrics():
    return rl_metrics(ROLLOUTS, 0.5, BATCH, EXPERIENCE, UPDATE, ALGORITHMS["ppo"])


def test_how_far_sampler_old_policy_and_updated_policy_are_from_each_other(metrics):
    assert metrics["sampler_mismatch"] == pytest.approx(0.5)
    assert metrics["sampler_ratio"] == pytest.approx((math.exp(0.5) + 3) / 4)
    # ratios 2, 1, 1, ½; k3 of the first is 2 − 1 − ln 2, of the last ½ − 1 + ln 2
    assert metrics["ratio/max"] == pytest.approx(2.0)
    assert metrics["ratio/min"] == pytest.approx(0.5)
    assert metrics["policy/kl_to_old"] == pytest.approx(0.5 / 4)
    assert metrics["ratio/first_error"] == 0.125 and metrics["reference/moved"] == 0.0


def test_clipped_tokens_are_divided_by_the_sign_of_their_advantage(metrics):
    # An advantage of 0 is not above 0. `clip_fraction` is of visits, not of the last ones.
    assert metrics["policy/clip_fraction"] == 0.75
    assert (metrics["policy/clip_high"], metrics["policy/clip_low"]) == (0.25, 0.5)


def test_entropies_and_surprise_are_means_over_tokens(metrics):
    # −log π − H: 0.5, 1, 0.5, 1
    assert metrics["policy/surprise_gap"] == pytest.approx(0.75)
    assert metrics["policy/entropy"] == pytest.approx(1.5)


def test_the_kl_is_of_responses_and_its_estimates_are_of_tokens(metrics):
    # log π − log π_ref: 0.5, 0, 0, −1
    assert metrics["kl"] == pytest.approx((0.5 - 1.0) / 2)
    assert metrics["kl/token_k1"] == pytest.approx((0.5 - 1.0) / 4)
    assert metrics["kl/token_k2"] == pytest.approx((0.125 + 0.5) / 4)
    of_k3 = (math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0)
    assert metrics["kl/token_k3"] == pytest.approx(of_k3 / 4)


def test_the_critic_and_the_importance_weights(metrics):
    assert (metrics["value/mean"], metrics["return/mean"]) == (2.0, 2.5)
    # errors 0, 1, 0, 1 of variance ¼; returns of variance ¾
    assert metrics["value/explained_variance"] == pytest.approx(1 - 1 / 3)
    assert metrics["correction/mean_weight"] == pytest.approx(0.625)


def test_advantages_and_rewards(metrics):
    assert metrics["advantage/std"] == pytest.approx(math.sqrt(1.25))
    assert (metrics["advantage/raw_mean"], metrics["advantage/raw_std"]) == (3.0, 1.0)
    assert metrics["advantage/reward_correlation"] == pytest.approx(-1.0)
    assert metrics["reward/length_correlation"] == pytest.approx(-1.0)
    assert (metrics["reward/std"], metrics["reward/unscored"], metrics["responses"]) == (1, 0.5, 2)
    assert metrics["loss/policy"] == 0.25 and metrics["grad_norm/actor"] == 2.0


def test_within_groups_rewards_are_relative_to_their_mean():
    batch = ragged_batch([2] * 4, [0.0] * 4, [0, 0, 1, 1], torch.float32)
    numbers = torch.tensor([0.5, 0.5, 3.0, 0.0, 9.0, 1.0, 7.0, 7.0])
    rewards = torch.full(batch.tokens.shape, 7.0).masked_scatter(batch.response_mask, numbers)
    experience = ALGORITHMS["grpo"].experience(batch)
    experience = dataclasses.replace(experience, token_rewards=rewards)
    update = dataclasses.replace(
        UPDATE,
        logprobs=rewards,
        entropy=rewards,
        clipped=batch.response_mask,
        row_advantages=torch.tensor([0.0, 2.0, 1.0, 1.0]),
    )
    # (−1, 1, −2, 2) and (−1, 1, 0, 0); (−6, −4, 3, 7) and (−1, 1, 0, 0)
    found = [earned_correlation(batch, experience, update, within) for within in (True, False)]
    assert found == pytest.approx([2 / math.sqrt(10 * 2), 2 / math.sqrt(110 * 2)])
    assert correlation([1.0, 1.0], [0.0, 1.0]) == 0.0
    assert correlation([0.0, 0.01], [0.0, 0.01]) == pytest.approx(1.0), "of any scale"


def test_the_most_common_response_is_counted_once_for_a_prompt():
    first, second, third = prompts(3)
    texts = [(first, "a"), (first, "b"), (first, "b"), (second, "a"), (third, "c")]
    made = [dataclasses.replace(rollout(p, (5,), 1.0), response=text) for p, text in texts]
    assert most_common(made) == pytest.approx(2 / 3)


def test_staleness_is_the_age_of_the_weights_of_each_token():
    mixed = dataclasses.replace(ROLLOUTS[0], versions=(3, 5, 5))
    whole = dataclasses.replace(ROLLOUTS[1], policy_version=4)
    before = {"sampler_ratio": 1.25}
    # ages 2, 0, 0 of tokens, and 1 of the response
    assert with_staleness(before, [mixed, whole], BATCH, EXPERIENCE, 5) == {
        "staleness/mean": 0.75,
        "staleness/max": 2.0,
        "staleness/ratio": 1.25,
        "staleness/thrown_away": 0.25,
    }
    fresh = dataclasses.replace(EXPERIENCE, weights=None)
    assert with_staleness(before, [whole], BATCH, fresh, 4) == {
        "sampler_ratio": 1.25,
        "staleness/mean": 0.0,
        "staleness/max": 0.0,
    }
