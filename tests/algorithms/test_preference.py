import math

import pytest
import torch

from quartet.algorithms.preference import (
    Dpo,
    Ipo,
    Kto,
    LastTokenLoss,
    Orpo,
    Pairs,
    PerTokenLoss,
    Simpo,
    after_divergence,
    bradley_terry,
    centring,
    log_odds_of,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(kl=0.0):
    """One comparison: log-ratios 2 and −1, responses of 4 and 2 tokens."""
    return Pairs(
        tensor(-4.0), tensor(-5.0), tensor(4.0), tensor(2.0), tensor(-6.0), tensor(-4.0), kl
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Dpo(beta=0.1), -math.log(sigmoid(0.3))),
        (
            Dpo(beta=0.1, label_smoothing=0.2),
            -0.8 * math.log(sigmoid(0.3)) - 0.2 * math.log(sigmoid(-0.3)),
        ),
        (Ipo(beta=0.1), (3 - 5) ** 2),
        (Ipo(beta=0.1, per="token"), (2 / 4 + 1 / 2 - 5) ** 2),
        (Kto(beta=0.1), (1 - sigmoid(0.2)) + (1 - sigmoid(0.1))),
        (
            Kto(beta=0.1, desirable=2.0, undesirable=3.0),
            2 * (1 - sigmoid(0.2)) + 3 * (1 - sigmoid(0.1)),
        ),
        # means per token −1 and −2.5
        (Simpo(beta=2.0, gamma=1.0), -math.log(sigmoid(2 * 1.5 - 1))),
        (
            Orpo(weight=0.1),
            1
            - 0.1
            * math.log(
                sigmoid(-1 - math.log(1 - math.exp(-1)) + 2.5 + math.log(1 - math.exp(-2.5)))
            ),
        ),
    ],
)
def test_each_loss_by_hand(loss, expected):
    assert loss(pairs()).item() == pytest.approx(expected, rel=1e-12)


def test_the_worked_numbers_of_the_docstrings():
    assert Dpo()(pairs()).item() == pytest.approx(0.5544, abs=1e-4)
    assert Kto()(pairs()).item() == pytest.approx(0.9252, abs=1e-4)
    one = Pairs(tensor(math.log(0.5)), tensor(math.log(0.2)), tensor(1.0), tensor(1.0))
    assert Orpo()(one).item() == pytest.approx(0.7155, abs=1e-4)
    two = Pairs(tensor(-1.0), tensor(-2.0), tensor(1.0), tensor(1.0))
    assert Simpo()(two).item() == pytest.approx(0.3133, abs=1e-4)


def test_kto_judges_from_where_the_policy_already_is():
    assert Kto(beta=0.1)(pairs(kl=0.5)).item() == pytest.approx(sigmoid(-0.15) + sigmoid(-0.15))


def test_at_the_reference_dpo_is_log_2_and_without_smoothing_conservative_dpo_is_dpo():
    same = Pairs(tensor(-4.0), tensor(-5.0), tensor(4.0), tensor(2.0), tensor(-4.0), tensor(-5.0))
    assert Dpo()(same).item() == pytest.approx(math.log(2))
    assert Dpo(label_smoothing=0.3)(same).item() == pytest.approx(math.log(2))


def test_ipo_stops_at_its_target():
    there = Pairs(tensor(1.0), tensor(-4.0), tensor(1.0), tensor(1.0), tensor(0.0), tensor(0.0))
    assert Ipo(beta=0.1)(there).item() == 0


@pytest.mark.parametrize("loss", [Dpo(), Dpo(label_smoothing=0.1), Ipo(), Kto(), Orpo(), Simpo()])
def test_gradients_agree_with_central_differences(loss):
    start = [tensor(-4.0, -1.0), tensor(-5.0, -0.5)]
    rest = (tensor(4.0, 2.0), tensor(2.0, 3.0), tensor(-6.0, -2.0), tensor(-4.0, -1.0), 0.3)
    variables = [x.clone().requires_grad_() for x in start]
    gradients = torch.autograd.grad(loss(Pairs(*variables, *rest)).sum(), variables)
    for which, gradient in enumerate(gradients):
        for i in range(2):
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in start]
                moved[which][i] += sign * 1e-6
                sides.append(loss(Pairs(*moved, *rest)).sum().item())
            assert gradient[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_certain_responses_have_finite_odds():
    assert log_odds_of(torch.tensor([0.0, -1e-9, -50.0])).isfinite().all()


def test_a_margin_must_be_won_by_and_centring_holds_the_mean():
    assert bradley_terry(tensor(1.0), tensor(-1.0), tensor(2.0)).item() == pytest.approx(
        math.log(2)
    )
    assert centring(tensor(1.5), tensor(-1.0)).item() == 0.25


CHOSEN, REJECTED = torch.tensor([[9, 5, 6, 7]]), torch.tensor([[9, 5, 8, 0]])
FOUR, THREE = torch.tensor([4]), torch.tensor([3])


def test_the_point_of_divergence_by_hand():
    # 9 5 6 7 against 9 5 8: from column 2, where 6 is not 8, to the end of the longer
    assert after_divergence(CHOSEN, REJECTED, FOUR, THREE).tolist() == [[False, False, True, True]]
    # one side is the beginning of the other: they diverge where it ends; ids behind the end do not count
    assert after_divergence(CHOSEN, CHOSEN, FOUR, THREE).tolist() == [[False, False, False, True]]
    assert after_divergence(REJECTED, REJECTED, THREE, THREE).tolist() == [[False] * 4]


def test_per_token_loss_by_hand():
    # heads 1 and 2 against 0.5, which stays behind its end: −log σ(0.5) and −log σ(1.5), their mean
    chosen, rejected = torch.tensor([[7.0, 7.0, 1.0, 2.0]]), torch.tensor([[9.0, 9.0, 0.5, 77.0]])
    differs = after_divergence(CHOSEN, REJECTED, FOUR, THREE)
    loss = PerTokenLoss()(chosen, rejected, FOUR, THREE, differs, torch.zeros(1))
    assert loss.item() == pytest.approx((-math.log(sigmoid(0.5)) - math.log(sigmoid(1.5))) / 2)
    last = LastTokenLoss(centring=0.1)(chosen, rejected, FOUR, THREE, differs, torch.ones(1))
    assert last.item() == pytest.approx(-math.log(sigmoid(2.0 - 0.5 - 1)) + 0.1 * 2.5**2)
