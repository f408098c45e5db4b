"""What small errors in the formulas were not noticed by other tests here (benchmarks/mutation.py), and are now."""

import dataclasses

import pytest
import torch

from quartet.algorithms.advantages import TemporalDifference
from quartet.algorithms.baselines import LeaveOneOut
from quartet.algorithms.describe import in_short
from quartet.algorithms.groups import AllGroups, DynamicSampling
from quartet.algorithms.imitation import PositiveExamples, Pretraining
from quartet.algorithms.kl import AdaptiveCoef, KLInLoss
from quartet.algorithms.policy_loss import Cispo, DualClip, KLPenalty, SequenceClip
from quartet.algorithms.preference import Kto, Pairs, after_divergence
from quartet.algorithms.presets import ALGORITHMS

DEFAULTS = [
    (SequenceClip(), {"low": 3e-4, "high": 4e-4}),  # GSPO, Zheng et al. 2025, section 5.1
    (DualClip(), {"low": 0.2, "high": 0.2, "cap": 3.0}),  # Ye et al. 2020
    (Cispo(), {"ratio_min": 0.0, "ratio_max": 5.0}),  # MiniMax-M1 2025
    (KLPenalty(), {"beta": 1.0, "target": 0.01}),
    (AdaptiveCoef(target=6.0), {"horizon": 10_000}),  # Ziegler et al. 2019
    (PositiveExamples(), {"coef": 0.0, "threshold": 0.0}),
    (Pretraining(), {"coef": 0.0, "batch_size": 8}),
    (KLInLoss(), {"estimator": "k3", "coef": 0.04, "weight": "none"}),
]


@pytest.mark.parametrize(("part", "values"), DEFAULTS, ids=lambda x: type(x).__name__)
def test_defaults_are_those_of_the_papers(part, values):
    assert {name: getattr(part, name) for name in values} == values


def test_what_parts_ask_for():
    assert TemporalDifference.needs_critic and not TemporalDifference.needs_group
    assert LeaveOneOut.needs_group and not LeaveOneOut.needs_critic and not KLInLoss().exact_reward
    assert not ALGORITHMS["ppo"].needs_entropy_gradient and ALGORITHMS["a2c"].needs_entropy_gradient
    assert not ALGORITHMS["ppo"].needs_step_kl
    penalty = dataclasses.replace(ALGORITHMS["ppo"], policy_loss=KLPenalty(target=0.02))
    assert (
        penalty.needs_step_kl
        and not dataclasses.replace(penalty, policy_loss=KLPenalty(target=0.0)).needs_step_kl
    )


def test_groups_without_signal_are_dropped_only_where_that_is_asked():
    assert AllGroups().keep([1.0, 1.0]) and AllGroups().keep([0.0, 1.0])
    assert DynamicSampling().keep([0.0, 1.0, 0.0]) and not DynamicSampling().keep([1.0, 1.0])


def test_a_side_that_ends_differs_though_the_other_goes_on_with_the_padding_token():
    # chosen (5 6), rejected (5 6 0): 0 pads the chosen side, and is a token of the rejected
    sides = torch.tensor([[5, 6, 0]]), torch.tensor([[5, 6, 0]])
    assert after_divergence(*sides, torch.tensor([2]), torch.tensor([3])).tolist() == [
        [False, False, True]
    ]
    assert after_divergence(*sides, torch.tensor([3]), torch.tensor([2])).tolist() == [
        [False, False, True]
    ]


def test_kto_counts_a_response_of_one_token():
    # log-ratios 0 and z = 0: σ(0) = 1/2 for the side that is there, 0 for the one that is not
    one, none = torch.tensor([1.0]), torch.tensor([0.0])
    zero = torch.zeros(1)
    assert Kto()(Pairs(zero, zero, one, none, zero, zero, 0.0)).tolist() == [0.5]
    assert Kto()(Pairs(zero, zero, none, one, zero, zero, 0.0)).tolist() == [0.5]


def test_a_part_in_short_shows_what_is_not_as_usual():
    assert "cap" in in_short(DualClip(cap=4.0)) and "4" in in_short(DualClip(cap=4.0))
    assert "low" not in in_short(DualClip(cap=4.0)) and "type" not in in_short(DualClip())
