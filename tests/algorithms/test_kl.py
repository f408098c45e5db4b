import math

import pytest
import torch

from quartet.algorithms.kl import (
    AdaptiveCoef,
    KLInLoss,
    KLInReward,
    NoKL,
    absolute,
    exact_kl,
    k1,
    k2,
    k3,
    squared,
)

ONE = torch.ones(1, 1, dtype=torch.bool)
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
        e: gradient(
            (logits.log_softmax(-1).exp().detach() * e(logits.log_softmax(-1), reference)).sum()
        )
        for e in (k1, k2)
    }
    torch.testing.assert_close(sampled[k2], exact)
    torch.testing.assert_close(sampled[k1], torch.zeros_like(exact), atol=1e-12, rtol=0)


def test_a_coefficient_of_the_reward_penalises_leaving_the_reference():
    part = KLInReward(coef=0.1)
    assert part.reward(HALF, QUARTER, None).item() == pytest.approx(-0.0693147, abs=1e-6)
    assert part.loss(HALF, HALF, QUARTER, None, ONE).item() == 0


def test_in_the_loss_it_is_added_with_its_coefficient():
    part = KLInLoss(coef=0.1)
    assert part.loss(HALF, HALF, QUARTER, None, ONE).item() == pytest.approx(0.0193147, abs=1e-6)
    assert part.reward(HALF, QUARTER, None).item() == 0


def test_no_kl_needs_no_reference():
    assert not NoKL().needs_reference
    assert (
        NoKL().reward(HALF, None, None).item()
        == NoKL().loss(HALF, HALF, None, None, ONE).item()
        == 0
    )


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        KLInReward(coef=-1)


def test_distances_and_the_exact_kl_by_hand():
    assert absolute(QUARTER, HALF).item() == pytest.approx(0.693147, abs=1e-6)
    assert squared(QUARTER, HALF).item() == pytest.approx(0.480453, abs=1e-6)
    # (0.5, 0.5) against (0.25, 0.75): 0.5 log 2 + 0.5 log ⅔ = 0.14384
    policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert exact_kl(policy, reference).item() == pytest.approx(0.143841, abs=1e-6)


def test_a_token_that_the_policy_rules_out_adds_nothing_to_the_exact_kl():
    assert exact_kl(
        torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    ).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (9.0, 0.2 * (1 + 0.2 * 64 / 10_000)),  # 9 / 6 − 1 = 0.5, cut to 0.2
        (6.6, 0.2 * (1 + 0.1 * 64 / 10_000)),
        (6.0, 0.2),
        (0.0, 0.2 * (1 - 0.2 * 64 / 10_000)),
    ],
)
def test_the_adaptive_coefficient_follows_ziegler(kl, expected):
    part = KLInReward(coef=0.2, controller=AdaptiveCoef(target=6.0, horizon=10_000))
    assert part.adapt({"kl": kl, "responses": 64.0}).coef == pytest.approx(expected, rel=1e-12)
    assert part.coef == 0.2


def test_a_fixed_coefficient_stays():
    assert KLInLoss(coef=0.04).adapt({"kl": 100.0, "responses": 64.0}) == KLInLoss(coef=0.04)


@pytest.mark.parametrize(
    "settings", [{"estimator": "k2", "weight": "token"}, {"estimator": "exact", "weight": "token"}]
)
def test_weights_that_would_correct_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"kl\.weight"):
        KLInLoss(**settings)


def test_in_the_loss_with_weights_the_gradient_is_that_of_the_kl_on_and_off_policy():
    """One token, all of its vocabulary, tokens drawn from π_old ≠ π: Σ π_old w k has the gradient of KL(π ‖ π_ref)."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(8, generator=rng, dtype=torch.float64, requires_grad=True)
    old, reference = (
        torch.randn(8, generator=rng, dtype=torch.float64).log_softmax(-1) for _ in range(2)
    )

    def gradient(part):
        policy = logits.log_softmax(-1)
        column = torch.ones(8, 1, dtype=torch.bool)
        loss = part.loss(policy[:, None], old[:, None], reference[:, None], None, column)[:, 0]
        return torch.autograd.grad((old.exp() * loss).sum(), logits)[0]

    policy = logits.log_softmax(-1)
    expected = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)[0]
    for estimator in ("k1", "k3"):
        for weight in ("token", "sequence"):  # one token is the whole sequence
            torch.testing.assert_close(
                gradient(KLInLoss(estimator=estimator, coef=1.0, weight=weight)), expected
            )
        assert (gradient(KLInLoss(estimator=estimator, coef=1.0)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_nan_in_padding_reaches_no_gradient(estimator, weight):
    if (estimator, weight) == ("exact", "token"):
        pytest.skip("refused")
    mask = torch.tensor([[True, True, False]])
    logprobs, exact = (torch.tensor([[-1.0, -1.5, math.nan]], requires_grad=True) for _ in range(2))
    old, ref = (torch.tensor([[-1.0, x, math.nan]]) for x in (-2.0, -2.5))
    loss = KLInLoss(estimator=estimator, weight=weight).loss(logprobs, old, ref, exact, mask)
    torch.where(mask, loss, 0.0).sum().backward()
    for leaf in (logprobs, exact):
        assert leaf.grad is None or leaf.grad.isfinite().all()
