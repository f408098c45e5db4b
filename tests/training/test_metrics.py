import dataclasses

import pytest
import torch

from quartet.training.batch import collate
from quartet.training.metrics import (
    distinct,
    explained_variance,
    groups_without_signal,
    mean_and_interval,
    repetition,
    response_metrics,
)
from tests.support.world import prompts, rollout

MASK = torch.tensor([[True, True, True, False]])


def test_explained_variance_of_a_perfect_a_flat_and_a_wrong_critic():
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(torch.full((1, 4), 7.0), returns, MASK) == 0
    # errors 2, 0, −2 around returns 1, 2, 3: 1 − (8/3) / (2/3) = −3
    assert explained_variance(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), returns, MASK) == pytest.approx(
        -3
    )
    same = torch.full((1, 4), 0.1)
    same[0, 1] = torch.nextafter(same[0, 1], torch.tensor(1.0))
    assert explained_variance(returns, same, MASK) == 0


def test_repetition_counts_pairs_said_before():
    # pairs ab bc ca ab bc: 5, of which 3 are different
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 - 3 / 5)
    assert repetition([1, 2, 3]) == repetition([1]) == 0
    assert repetition([1] * 11) == pytest.approx(0.9)


def test_answers_are_counted():
    looping = dataclasses.replace(
        rollout(prompts(1)[0], (5, 5, 5, 5, 5), 2.0),
        finish_reason="length",
        policy_mask=(True, False, True, True, False),
    )
    plain = rollout(prompts(1)[0], (5, 6, 7), 1.0)
    made = response_metrics([dataclasses.replace(plain, policy_mask=(True,) * 3), looping])
    assert made["reward"] == made["reward/tiny"] == 1.5
    assert made["response/tokens"] == 4 and made["response/ended"] == 0.5
    # 4 pairs, of which 1 is different; two turns and one
    assert made["response/repetition"] == 0.75 / 2 and made["response/turns"] == 1.5
    assert "response/turns" not in response_metrics([plain])


def test_where_nothing_is_rewarded_there_is_no_reward():
    """As in distillation. A reward of 0 is one."""
    nothing = dataclasses.replace(rollout(prompts(1)[0], (5, 6), 0.0), components={})
    assert "reward" not in response_metrics([nothing])
    assert response_metrics([rollout(prompts(1)[0], (5, 6), 0.0)])["reward"] == 0


def test_distinct_and_intervals():
    assert distinct(["a", "b", "a", "c"]) == 0.75
    # mean 0.5, sample std 0.57735, half width 1.96 · 0.57735 / 2
    assert mean_and_interval([0.0, 1.0, 0.0, 1.0]) == pytest.approx((0.5, 0.5658), abs=1e-4)


def test_perplexity_on_demonstrations_and_drift_of_the_reward_model_are_in_the_run(ppo_run):
    series = ppo_run.series["ppo"]
    perplexity, drift = (
        [x for x in series.columns[name] if x == x]  # noqa: PLR0124
        for name in ("policy/sft_perplexity", "reward/drift")
    )
    assert len(perplexity) == len(ppo_run.steps("probes")) - 1 and all(
        1 < x < 1e6 for x in perplexity
    )
    assert drift == [0.0] * len(perplexity), "a reward model does not learn while it judges"


def test_groups_without_signal_are_counted_where_prompts_have_several_responses():
    def share(groups, scores):
        batch = collate([rollout(prompts(1)[0], (5, 6), score) for score in scores])
        return groups_without_signal(dataclasses.replace(batch, groups=torch.tensor(groups)))

    assert share([0, 0, 1, 1], [1.0, 1.0, 0.0, 1.0]) == 0.5
    assert share([0, 1, 2], [1.0, 1.0, 0.0]) is None
