"""What on-policy distillation descends, in an environment that can be enumerated. The reference of
`closed_form` is the teacher."""

import dataclasses

import pytest
import torch

from quartet.algorithms.baselines import ReturnToGo
from quartet.algorithms.kl import KLInLoss, exact_kl
from quartet.algorithms.presets import ALGORITHMS
from tests.support import closed_form
from tests.support.closed_form import (
    MASK,
    PREFIXES,
    REFERENCE,
    RESPONSES,
    VISITED,
    V,
    distribution,
    gradients,
    token_logprobs,
)

PRESET = ALGORITHMS["on_policy_distillation"]
EXACT = dataclasses.replace(PRESET, kl=KLInLoss(estimator="exact", coef=1.0))
EVERYTHING = torch.arange(len(RESPONSES))


@pytest.fixture(autouse=True)
def no_reward(monkeypatch):
    monkeypatch.setattr(closed_form, "SCORES", torch.zeros(len(RESPONSES), dtype=torch.float64))


@pytest.fixture
def student():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(len(PREFIXES), V, generator=rng, dtype=torch.float64, requires_grad=True)


def expected_gradient(algorithm, logits):
    """The gradient of the loss, summed over tokens, in expectation over the student's responses."""
    values = torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    weights = distribution(logits.detach())
    batch = closed_form.make_batch(logits, EVERYTHING, EVERYTHING, values.detach())
    made = algorithm.experience(batch)
    return gradients(algorithm, made, logits, values, EVERYTHING, weights)[0]


def kl_of_each_token(logits):
    """Σ_s d(s) KL(π(· | s) ‖ π_teacher(· | s)), d(s) the probability that the student comes to s,
    held fixed."""
    reached = torch.zeros(len(PREFIXES), dtype=torch.float64)
    weights = distribution(logits.detach())[:, None].expand_as(MASK)
    reached.index_add_(0, VISITED[MASK], weights[MASK])
    return (reached * exact_kl(logits.log_softmax(-1), REFERENCE.log_softmax(-1))).sum()


def kl_of_responses(logits):
    p = distribution(logits)
    return (p * (p / distribution(REFERENCE)).log()).sum()


@pytest.mark.parametrize("algorithm", [PRESET, EXACT], ids=["sampled token", "whole vocabulary"])
def test_the_gradient_is_that_of_the_kl_of_each_token(student, algorithm):
    [expected] = torch.autograd.grad(kl_of_each_token(student), student)
    torch.testing.assert_close(expected_gradient(algorithm, student), expected)
    [other] = torch.autograd.grad(kl_of_responses(student), student)
    assert (expected - other).abs().max() > 0.05, "the two objectives can be told apart"


def test_without_a_discount_it_is_the_gradient_of_the_kl_of_whole_responses(student):
    undiscounted = dataclasses.replace(PRESET, advantage=ReturnToGo())
    [expected] = torch.autograd.grad(kl_of_responses(student), student)
    torch.testing.assert_close(expected_gradient(undiscounted, student), expected)


def test_the_reward_of_a_token_is_its_log_ratio():
    """π_teacher = 0.5 and π = 0.25: a reward of log 2 for the token, whatever comes after it."""
    batch = closed_form.make_batch(REFERENCE, EVERYTHING, EVERYTHING, REFERENCE[:, 0])
    old = token_logprobs(REFERENCE, EVERYTHING) - torch.tensor(2.0).log()
    advantages = PRESET.experience(dataclasses.replace(batch, old_logprobs=old)).advantages
    torch.testing.assert_close(advantages, torch.where(MASK, 0.6931471805599453, 0.0).double())


def test_the_student_becomes_the_teacher(student):
    logits = student.detach().clone().requires_grad_()
    for _ in range(1000):
        logits.grad = expected_gradient(PRESET, logits)
        with torch.no_grad():
            logits -= 2.0 * logits.grad
    assert kl_of_responses(student).item() > 0.5
    assert kl_of_responses(logits).item() < 1e-3
