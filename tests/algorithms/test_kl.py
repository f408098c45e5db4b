import math

import pytest
import torch

from quartet.algorithms.kl import KLInLoss, KLInReward, NoKL, k1, k2, k3

HALF, QUARTER = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])


def test_estimators_by_hand():
    # d = log(0.5 / 0.25) = 0.6931; k2 = d²/2 = 0.2402; k3 = e^−d − 1 + d = 0.5 − 1 + 0.6931 = 0.1931
    assert k1(HALF, QUARTER).item() == pytest.approx(0.693147, abs=1e-6)
    assert k2(HALF, QUARTER).item() == pytest.approx(0.240227, abs=1e-6)
    assert k3(HALF, QUARTER).item() == pytest.approx(0.193147, abs=1e-6)


def test_k1_and_k3_are_unbiased_over_a_whole_vocabulary():
    policy = torch.randn(1, 50, dtype=torch.float64).log_softmax(-1)
    reference = torch.randn(1, 50, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)


def test_k3_is_never_negative_and_zero_between_equals():
    a, b = torch.randn(20, 20), torch.randn(20, 20)
    assert (k3(a, b) >= 0).all()
    assert (k3(a, a) == 0).all()


def test_as_a_loss_k2_has_the_exact_gradient_and_k1_none():
    logits = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(1, 8, dtype=torch.float64).log_softmax(-1)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    policy = logits.log_softmax(-1)
    exact = gradient((policy.exp() * (policy - reference)).sum())
    sampled = {
        e: gradient((logits.log_softmax(-1).exp().detach() * e(logits.log_softmax(-1), reference)).sum()) for e in (k1, k2)
    }
    torch.testing.assert_close(sampled[k2], exact)
    torch.testing.assert_close(sampled[k1], torch.zeros_like(exact), atol=1e-12, rtol=0)


def test_a_coefficient_of_the_reward_penalises_leaving_the_reference():
    part = KLInReward(coef=0.1)
    assert part.reward(HALF, QUARTER).item() == pytest.approx(-0.0693147, abs=1e-6)
    assert part.loss(HALF, QUARTER).item() == 0


def test_in_the_loss_it_is_added_with_its_coefficient():
    part = KLInLoss(coef=0.1)
    assert part.loss(HALF, QUARTER).item() == pytest.approx(0.0193147, abs=1e-6)
    assert part.reward(HALF, QUARTER).item() == 0


def test_no_kl_needs_no_reference():
    assert not NoKL().needs_reference
    assert NoKL().reward(HALF, None).item() == NoKL().loss(HALF, None).item() == 0


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        KLInReward(coef=-1)
