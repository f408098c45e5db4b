"""The weights of responses that another engine sampled: numbers by hand, and which one a run with servers has."""

import dataclasses
import math

import pytest
import torch

from quartet.algorithms.algorithm import Forward
from quartet.algorithms.correction import (
    SequenceMasked,
    SequenceTruncated,
    Truncated,
    for_another_engine,
)
from quartet.algorithms.policy_loss import PolicyLoss, SequenceClip, Surrogate
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.update import TrustRegion
from tests.algorithms.test_algorithm import batch

LOG2 = math.log(2.0)
TRUE = torch.ones(1, 3, dtype=torch.bool)


def of_weights(*weights):
    """Old and sampler's log-probs of one response whose tokens have these weights."""
    sampler = torch.full((1, len(weights)), -3.0, dtype=torch.float64)
    return sampler + torch.tensor([weights], dtype=torch.float64).log(), sampler


def test_a_weight_above_the_cap_is_cut_and_one_below_stays():
    old, sampler = of_weights(0.5, 3.0, 1.5)
    weights = Truncated()(old, sampler, TRUE)
    assert weights.tolist() == [pytest.approx([0.5, 2.0, 1.5])]


def test_a_floor_lifts_the_weights_below_it():
    old, sampler = of_weights(0.1, 7.0, 1.5)
    weights = Truncated(cap=5.0, floor=0.5)(old, sampler, TRUE)
    assert weights.tolist() == [pytest.approx([0.5, 5.0, 1.5])]


def test_the_weight_of_a_response_can_be_the_product_of_its_tokens():
    """1/2 · 1/2 · 3 = 3/4; a token that is masked out has no part in it; 2 · 2 = 4 is cut at 2."""
    old, sampler = of_weights(0.5, 0.5, 3.0)
    product = SequenceTruncated(ratio="product")
    assert product(old, sampler, TRUE).tolist() == [pytest.approx([0.75] * 3)]
    first_two = torch.tensor([[True, True, False]])
    assert product(old, sampler, first_two).tolist() == [pytest.approx([0.25, 0.25, 0.0])]
    assert product(*of_weights(2.0, 2.0, 1.0), TRUE).tolist() == [pytest.approx([2.0] * 3)]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        # 2 · 1.2 · 1 = 2.4, its cube root 1.34
        (SequenceMasked(), [2.4] * 3),
        (SequenceMasked(weight="token"), [2.0, 1.2, 1.0]),
        (SequenceMasked(high=2.0, weight="token"), [0.0] * 3),
        (SequenceMasked(high=2.0, ratio="geometric_mean"), [2.4 ** (1 / 3)] * 3),
        (SequenceMasked(high=2.0, ratio="geometric_mean", weight="token"), [2.0, 1.2, 1.0]),
        (SequenceMasked(high=1.3, ratio="geometric_mean", weight="token"), [0.0] * 3),
    ],
)
def test_a_filter_of_responses_by_product_or_mean_with_either_weight(part, expected):
    old, sampler = of_weights(2.0, 1.2, 1.0)
    assert part(old, sampler, TRUE).tolist() == [pytest.approx(expected)]


def test_the_weight_of_a_response_is_the_geometric_mean_of_its_tokens():
    """(4 · 1/4 · 8)^(1/3) = 2; with a cap of 1.5 it is 1.5; a token that is masked out has no part in it."""
    old, sampler = of_weights(4.0, 0.25, 8.0)
    assert SequenceTruncated()(old, sampler, TRUE).tolist() == [pytest.approx([2.0, 2.0, 2.0])]
    capped = SequenceTruncated(cap=1.5)(old, sampler, TRUE)
    assert capped.tolist() == [pytest.approx([1.5, 1.5, 1.5])]
    first_two = torch.tensor([[True, True, False]])
    assert SequenceTruncated()(old, sampler, first_two).tolist() == [pytest.approx([1.0, 1.0, 0.0])]


def test_with_it_gspos_ratio_is_that_of_the_policy_to_the_sampler():
    """s(π / π_old) · s(π_old / μ) = s(π / μ): ratios (2, 2, 1) and weights (1/2, 2, 2) give (2 · 4 · 1/2 · 2)^(1/3) = 2."""
    old, sampler = of_weights(0.5, 2.0, 2.0)
    now = old + torch.tensor([[LOG2, LOG2, 0.0]], dtype=torch.float64)
    advantage = torch.ones_like(old)
    loss = SequenceClip(low=0.9, high=9.0)
    uncorrected = loss(Surrogate(now, old, advantage, TRUE))
    of_the_sampler = loss(Surrogate(now, sampler, advantage, TRUE))
    corrected = SequenceTruncated(cap=9.0)(old, sampler, TRUE) * uncorrected
    assert torch.allclose(corrected, of_the_sampler)
    assert of_the_sampler[0, 0].item() == pytest.approx(-(8.0 ** (1 / 3)))


def test_with_the_product_the_ratio_of_responses_is_that_of_the_policy_to_the_sampler():
    """Ratios (2, 2, 1) and weights (1/2, 2, 2): 4 · 2 = 8."""
    old, sampler = of_weights(0.5, 2.0, 2.0)
    now = old + torch.tensor([[LOG2, LOG2, 0.0]], dtype=torch.float64)
    loss = SequenceClip(low=0.9, high=9.0, ratio="product")
    surrogate = Surrogate(now, old, torch.ones_like(old), TRUE)
    correction = for_another_engine(loss.type, loss.ratio)
    assert correction == SequenceTruncated(ratio="product")
    corrected = dataclasses.replace(correction, cap=9.0)(old, sampler, TRUE) * loss(surrogate)
    assert corrected.tolist() == [pytest.approx([-8.0] * 3)]


def test_the_policy_loss_by_hand_with_truncated_weights():
    """One response of three tokens, A = 1, ratios 1, weights (0.5, 3, 1.5): −(0.5 + 2 + 1.5) / 3 for a mean over tokens."""
    algorithm = dataclasses.replace(ALGORITHMS["reinforce_pp"], correction=Truncated())
    made = batch((3,), sampler_is_off=False)
    shift = torch.tensor([0.5, 3.0, 1.5], dtype=torch.float64).log()
    rollout = made.old_logprobs.clone()
    rollout[made.response_mask] -= shift
    experience = algorithm.experience(dataclasses.replace(made, rollout_logprobs=rollout))
    experience = dataclasses.replace(
        experience, advantages=experience.response_mask.to(torch.float64)
    )
    now = Forward(experience.old_logprobs, torch.zeros_like(experience.old_logprobs))
    terms = algorithm.loss(experience, now, algorithm.denominators(experience))
    assert terms["policy"].item() == pytest.approx(-(0.5 + 2.0 + 1.5) / 3)


def test_the_correction_of_every_policy_loss_suits_its_ratio():
    """The table, and a check of it: whether a token's ratio moves the loss of another token."""
    table = {
        name: for_another_engine(name).type
        for name, member in PolicyLoss.members.items()
        if ":" not in name and not member.internal
    }
    token = dict.fromkeys(
        ["reinforce", "importance_weighted", "kl_penalty", "clip", "cispo", "sapo"], "truncated"
    )
    response = dict.fromkeys(["sequence_clip", "gmpo"], "sequence_truncated")
    assert {name: table[name] for name in token | response} == token | response
    for name in token | response:
        old = torch.full((1, 3), -1.0, dtype=torch.float64)
        now, moved = old + 1e-5, old + torch.tensor([[1e-5, 9e-5, 1e-5]], dtype=torch.float64)
        loss = PolicyLoss.members[name]()
        first, second = (
            loss(Surrogate(x, old, torch.ones_like(old), TRUE))[0, 0] for x in (now, moved)
        )
        assert (first != second).item() == (name in response), name


def test_a_trust_region_takes_the_sampler_into_its_surrogate():
    """Σ_t w_t ρ_t A_t is the importance-sampled objective: with w < cap it is that of ratios to the sampler."""
    trpo = ALGORITHMS["trpo"]
    assert isinstance(trpo.update, TrustRegion)
    assert for_another_engine(trpo.policy_loss.type) == Truncated()
    old, sampler = of_weights(0.5, 1.5, 1.0)
    now, advantage = old + 0.1, torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    corrected = Truncated()(old, sampler, TRUE) * trpo.policy_loss(
        Surrogate(now, old, advantage, TRUE)
    )
    assert torch.allclose(corrected, trpo.policy_loss(Surrogate(now, sampler, advantage, TRUE)))
