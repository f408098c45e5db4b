import math

import pytest
import torch

from quartet.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from quartet.algorithms.entropy import EntropyBonus
from quartet.algorithms.policy_loss import (
    Clip,
    DualClip,
    Gmpo,
    ImportanceWeighted,
    Reinforce,
    Surrogate,
)
from quartet.algorithms.preference import bradley_terry
from quartet.algorithms.value_loss import ClippedValueLoss

ONE = torch.ones(1, 1, dtype=torch.bool)


def clip_loss_and_gradient(ratio: float, advantage: float) -> tuple[float, float]:
    """The loss of one token with this ratio, and its gradient with respect to the log-prob."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 1, dtype=torch.float64)
    loss = Clip()(Surrogate(logprob, old, torch.tensor([[advantage]], dtype=torch.float64), ONE))
    loss.sum().backward()
    return loss.item(), logprob.grad.item()


@pytest.mark.parametrize(
    ("case", "ratio", "advantage", "loss", "gradient"),
    [
        # Schulman et al. 2017, figure 1, ε = 0.2: −min(ρA, clip(ρ)A); the gradient of −ρA is −ρA.
        ("A > 0, ratio below: pulled up", 0.5, 2.0, -1.0, -1.0),
        ("A > 0, ratio inside: pulled up", 1.1, 2.0, -2.2, -2.2),
        ("A > 0, ratio above: clipped", 1.5, 2.0, -2.4, 0.0),
        ("A < 0, ratio below: clipped", 0.5, -2.0, 1.6, 0.0),
        ("A < 0, ratio inside: pushed down", 1.1, -2.0, 2.2, 2.2),
        ("A < 0, ratio above: pushed down", 1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_six_cases_of_the_clip(case, ratio, advantage, loss, gradient):
    measured = clip_loss_and_gradient(ratio, advantage)
    assert measured == pytest.approx((loss, gradient), abs=1e-9)
    zeros = torch.zeros(1, 1)
    says = Clip().clipped(
        Surrogate(torch.tensor([[math.log(ratio)]]), zeros, torch.tensor([[advantage]]), ONE)
    )
    assert says.item() == (gradient == 0)


def test_an_asymmetric_clip_lets_good_tokens_rise_further():
    wide = Clip(low=0.2, high=0.28)
    assert wide(
        Surrogate(torch.tensor([[math.log(1.25)]]), torch.zeros(1, 1), torch.ones(1, 1), ONE)
    ).item() == pytest.approx(-1.25)
    assert wide(
        Surrogate(torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.ones(1, 1), ONE)
    ).item() == pytest.approx(-1.28)


@pytest.mark.parametrize("log_ratio", [19.0, 21.0, -21.0])
@pytest.mark.parametrize("loss", [Clip(), DualClip(cap=1e12), ImportanceWeighted()])
def test_a_token_counts_as_clipped_where_its_ratio_is_held(loss, log_ratio):
    logprob = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.zeros_like(logprob), -torch.ones_like(logprob)
    tokens = Surrogate(logprob, old, advantage, ONE)
    (gradient,) = torch.autograd.grad(loss(tokens).sum(), logprob)
    assert loss.clipped(tokens).item() == (gradient.item() == 0) == (abs(log_ratio) > 20)


def test_an_absurd_ratio_stays_finite():
    assert (
        Clip()(Surrogate(torch.tensor([[500.0]]), torch.zeros(1, 1), -torch.ones(1, 1), ONE))
        .isfinite()
        .all()
    )


def test_value_loss_by_hand():
    # V = 1, V_old = 0, R = 2: plain ½·1 = 0.5; clipped at 0.2: ½·(0.2 − 2)² = 1.62, the larger
    one, zero, two = torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 2.0)
    assert ClippedValueLoss(coef=1.0)(one, zero, two).item() == pytest.approx(1.62)
    assert ClippedValueLoss(clip=float("inf"), coef=1.0)(one, zero, two).item() == pytest.approx(
        0.5
    )
    assert ClippedValueLoss(coef=0.1)(one, zero, two).item() == pytest.approx(0.162)


def test_a_value_that_went_too_far_towards_its_target_stops_moving():
    value = torch.ones(1, 1, requires_grad=True)
    ClippedValueLoss()(value, torch.zeros(1, 1), torch.full((1, 1), 2.0)).sum().backward()
    assert value.grad.item() == 0


def test_a_value_that_moved_away_from_its_target_is_pulled_back():
    value = torch.ones(1, 1, requires_grad=True)
    ClippedValueLoss(coef=1.0)(value, torch.zeros(1, 1), torch.full((1, 1), -2.0)).sum().backward()
    assert value.grad.item() == pytest.approx(3.0)


def test_bradley_terry_by_hand_and_at_extremes():
    chosen, rejected = torch.tensor([1.0, 0.0, -100.0]), torch.tensor([-1.0, 0.0, 100.0])
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(
        [0.126928, math.log(2), 200.0], abs=1e-5
    )


def test_entropy_bonus_rewards_indecision():
    assert EntropyBonus(coef=0.01)(torch.tensor([[2.0]]), None).item() == pytest.approx(-0.02)


LOSS = torch.tensor([[1.0, 3.0, 5.0], [7.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_aggregations_by_hand():
    # tokens: (1 + 3 + 5 + 7) / 4 = 4; sequences: (3 + 7) / 2 = 5, the empty one not counted; length 8: 16 / (2 · 8) = 1
    for part, expected in ((TokenMean(), 4.0), (SequenceMean(), 5.0), (FixedLength(length=8), 1.0)):
        assert part(LOSS, MASK, part.denominator(MASK)).item() == expected


@pytest.mark.parametrize("part", [TokenMean(), SequenceMean(), FixedLength(length=8)])
def test_pieces_add_up_to_the_whole(part):
    denominator = part.denominator(MASK)
    pieces = sum(part(LOSS[i : i + 1], MASK[i : i + 1], denominator) for i in range(3))
    torch.testing.assert_close(pieces, part(LOSS, MASK, denominator))


@pytest.mark.parametrize(
    ("policy_loss", "expected"), [(Reinforce(), 0.16), (ImportanceWeighted(), 0.16), (None, 0.032)]
)
def test_the_expected_gradient_of_each_loss_of_a_sampled_token(policy_loss, expected):
    """Two tokens, probabilities 0.8 and 0.2, advantages 0 and 1: the table in docs/algorithms.md.
    None is −A π, which no preset has."""
    logits = torch.tensor([0.8, 0.2], dtype=torch.float64).log().requires_grad_()
    logprobs, advantages = logits.log_softmax(-1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    old = logprobs.detach()
    tokens = Surrogate(
        logprobs[:, None], old[:, None], advantages[:, None], torch.ones(2, 1, dtype=torch.bool)
    )
    losses = -advantages * logprobs.exp() if policy_loss is None else policy_loss(tokens)[:, 0]
    (old.exp() * losses).sum().backward()
    assert -float(logits.grad[1]) == pytest.approx(expected)


def test_nan_in_padding_reaches_no_gradient_of_gmpo():
    """Its ratio is one number per response, so a product with NaN at one token would spoil all."""
    mask = torch.tensor([[True, True, False]])
    logprobs = torch.tensor([[-1.0, -1.5, torch.nan]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[1.0, 1.0, torch.nan]])
    loss = Gmpo()(Surrogate(logprobs, old, advantages, mask))
    torch.where(mask, loss, 0.0).sum().backward()
    assert logprobs.grad.isfinite().all()
