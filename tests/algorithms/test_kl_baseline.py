"""The baseline of the KL in the loss: its numbers, and that it leaves the expected gradient as it is."""

import dataclasses

import pytest
import torch

from quartet.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.baselines import ReturnToGo
from quartet.algorithms.kl import KLInLoss, by_token, k3, kl_to_go_of_others
from quartet.algorithms.masked import masked, mean_of_others
from tests.support import closed_form

EVERYTHING = torch.arange(len(closed_form.RESPONSES))
PAIRS = torch.cartesian_prod(EVERYTHING, EVERYTHING)
NO_VALUES = torch.zeros(len(closed_form.PREFIXES), dtype=torch.float64)


def kl_alone(estimator, baseline="leave_one_out", weight="sequence"):
    """The KL of the loss with nothing beside it: scores are cut to (almost) nothing."""
    kl = KLInLoss(estimator=estimator, coef=1.0, weight=weight, baseline=baseline)
    return Algorithm(advantage=ReturnToGo(), kl=kl, aggregation=FixedLength(length=1))


def policies(seed=0, away=1.0):
    rng = torch.Generator().manual_seed(seed)
    old = torch.randn(closed_form.REFERENCE.shape, generator=rng, dtype=torch.float64)
    noise = torch.randn(closed_form.REFERENCE.shape, generator=rng, dtype=torch.float64)
    return old, (old + away * noise).requires_grad_()


def true_gradient(logits):
    p = closed_form.distribution(logits)
    kl = (p * (p / closed_form.distribution(closed_form.REFERENCE)).log()).sum()
    return torch.autograd.grad(kl, logits)[0]


def kl_gradients(algorithm, logits, old, rows, groups, weights=None, sampler=None):
    """The gradient of the KL term alone, of weighted rows."""
    batch = closed_form.make_batch(old, rows, groups, NO_VALUES)
    if sampler is not None:
        drawn = closed_form.token_logprobs(sampler, rows)
        batch = dataclasses.replace(batch, rollout_logprobs=drawn)
    made = algorithm.experience(batch)
    state = torch.where(closed_form.MASK[rows], closed_form.VISITED[rows], 0)
    every = closed_form.exact_kl(logits.log_softmax(-1), closed_form.REFERENCE.log_softmax(-1))
    logprobs = masked(closed_form.token_logprobs(logits, rows), made.response_mask)
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    per_token = algorithm._kl(made, logprobs, masked(every[state], made.response_mask))
    loss = (weights[:, None] * torch.where(made.response_mask, per_token, 0.0)).sum()
    return torch.autograd.grad(loss, logits)[0]


def relative_error(found, true):
    return float((found - true).norm() / true.norm())


def pairs_in_groups(algorithm, logits, old):
    """The expectation over every pair of responses, drawn from `old` and compared as a group."""
    p = closed_form.distribution(old)[PAIRS].prod(dim=1).repeat_interleave(2)
    groups = torch.arange(len(PAIRS)).repeat_interleave(2)
    return kl_gradients(algorithm, logits, old, PAIRS.flatten(), groups, p) / 2


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_the_expected_gradient_off_policy_is_that_of_the_kl_of_whole_responses(estimator):
    old, logits = policies()
    assert (
        closed_form.total_variation(*map(closed_form.distribution, (old, logits.detach()))) > 0.28
    )
    true = true_gradient(logits)
    assert relative_error(pairs_in_groups(kl_alone(estimator), logits, old), true) < 1e-12
    # The baseline did something: single pairs have another gradient with it than without.
    few, groups = torch.tensor([3, 30, 17, 25]), torch.tensor([0, 0, 1, 1])
    with_it, without = (
        kl_gradients(kl_alone(estimator, b), logits, old, few, groups)
        for b in ("leave_one_out", "none")
    )
    assert relative_error(with_it, without) > 0.1


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_weights_are_ratios_to_the_policy_that_sampled_and_not_to_that_of_the_step(weight):
    """With a staleness, a step begins with other weights than those that sampled."""
    sampler, logits = policies()
    begins_with, _ = policies(seed=5)
    p = closed_form.distribution(sampler)

    def expected(old):
        return kl_gradients(
            kl_alone("k3", "none", weight), logits, old, EVERYTHING, EVERYTHING, p, sampler
        )

    torch.testing.assert_close(expected(begins_with), expected(sampler))
    if weight == "sequence":
        assert relative_error(expected(begins_with), true_gradient(logits)) < 1e-12


def test_without_groups_the_baseline_is_that_of_the_step_as_one_group():
    """So what the enumeration of groups shows holds of a step without groups, too."""
    old, _ = policies(seed=1)
    rows, algorithm = torch.tensor([3, 30, 17, 25]), kl_alone("k3")
    alone, together = (
        algorithm.experience(closed_form.make_batch(old, rows, groups, NO_VALUES)).kl_baselines
        for groups in (torch.arange(4), torch.zeros(4, dtype=torch.long))
    )
    assert alone.abs().sum() > 0
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


def test_a_baseline_that_reads_its_own_response_would_be_biased(monkeypatch):
    old, logits = policies()
    own = lambda x, groups: (mean_of_others(x, groups) + x) / 2  # noqa: E731
    monkeypatch.setattr("quartet.algorithms.kl.mean_of_others", own)
    found = pairs_in_groups(kl_alone("k3"), logits, old)
    assert relative_error(found, true_gradient(logits)) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_the_variance_over_groups_falls(estimator):
    """The mean over 100 groups of eight of |gradient − true gradient|²."""
    old, logits = policies(away=0.0)
    true, p = true_gradient(logits), closed_form.distribution(old)

    def spread(baseline):
        rng = torch.Generator().manual_seed(0)
        total = 0.0
        for _ in range(100):
            rows = torch.multinomial(p, 8, replacement=True, generator=rng)
            groups = torch.zeros(8, dtype=torch.long)
            found = kl_gradients(kl_alone(estimator, baseline), logits, old, rows, groups) / 8
            total += float((found - true).square().sum())
        return total

    assert spread("leave_one_out") < 0.9 * spread("none")


def test_the_value_of_the_loss_stays_the_kl():
    old, logits = policies()
    rows, groups = torch.tensor([3, 30, 17, 25]), torch.tensor([0, 0, 1, 1])
    batch = closed_form.make_batch(old, rows, groups, NO_VALUES)
    now = Forward(closed_form.token_logprobs(logits, rows), torch.zeros_like(batch.old_logprobs))
    values = []
    for baseline in ("none", "leave_one_out"):
        algorithm = kl_alone("k3", baseline)
        made = algorithm.experience(batch)
        values.append(algorithm.loss(made, now, algorithm.denominators(made))["kl"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] > 0


def test_micro_batches_have_the_gradient_of_the_step():
    """The baseline is of the whole step, however its rows are cut."""
    old, logits = policies()
    rows, groups = torch.tensor([3, 30, 17, 25]), torch.tensor([0, 0, 1, 2])
    algorithm = kl_alone("k3")
    made = algorithm.experience(closed_form.make_batch(old, rows, groups, NO_VALUES))
    denominators = algorithm.denominators(made)

    def gradient(indices):
        part = made.rows(indices)
        width = part.tokens.shape[1]
        logprobs = closed_form.token_logprobs(logits, rows[indices])[:, :width]
        now = Forward(logprobs, torch.zeros_like(logprobs))
        return torch.autograd.grad(algorithm.loss(part, now, denominators)["kl"], logits)[0]

    whole, pieces = gradient([0, 1, 2, 3]), gradient([0]) + gradient([1, 2]) + gradient([3])
    torch.testing.assert_close(whole, pieces)


def test_the_mean_kl_to_go_of_the_others_by_hand():
    mask = torch.tensor([[False, True, False, True, False], [True, True, True, False, False]])
    kl = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0], [3.0, 4.0, 5.0, 9.0, 9.0]])
    group = torch.tensor([0, 0])
    to_go = kl_to_go_of_others(kl, mask, group)
    assert to_go.tolist() == [[0, 12, 0, 9, 0], [3, 2, 0, 0, 0]]
    assert by_token(to_go, mask).tolist() == [[0, 3, 0, 9, 0], [1, 2, 0, 0, 0]]
    later = kl_to_go_of_others(kl, mask, group, own_token=False)
    assert later.tolist() == [[0, 9, 0, 5, 0], [2, 0, 0, 0, 0]]


def test_the_mean_of_others_against_a_loop():
    x, groups = torch.randn(7, 3, dtype=torch.float64), torch.tensor([4, 1, 4, 4, 0, 1, 9])
    for i, row in enumerate(mean_of_others(x, groups)):
        others = [j for j in range(7) if j != i and groups[j] == groups[i]]
        others = others or [j for j in range(7) if j != i]
        torch.testing.assert_close(row, x[others].mean(dim=0))
    assert mean_of_others(x[:1], groups[:1]).tolist() == [[0, 0, 0]]


def test_an_empty_response_and_nan_in_padding_are_harmless():
    mask = torch.tensor([[True, True], [False, False]])
    old = torch.tensor([[-1.0, -2.0], [float("nan")] * 2])
    part = KLInLoss(coef=1.0, weight="sequence", baseline="leave_one_out")
    to_go = kl_to_go_of_others(k3(old, old - 1), mask, torch.tensor([0, 0]))
    assert to_go.tolist() == [[0, 0], [0, 0]]
    now = old.clone().requires_grad_()
    part.loss(now, old, old - 1, None, mask, torch.ones(2, 2))[mask].sum().backward()
    assert now.grad is not None and now.grad.isfinite().all()


def test_what_would_make_it_biased_or_pointless_is_refused():
    with pytest.raises(ValueError, match=r'kl\.weight = "token" leaves out'):
        KLInLoss(weight="token", baseline="leave_one_out")
    usual = kl_alone("k3")
    dataclasses.replace(usual, aggregation=TokenMean())
    with pytest.raises(ValueError, match="fixed_length"):
        dataclasses.replace(usual, aggregation=SequenceMean())
    with pytest.raises(ValueError, match="mask_truncated"):
        dataclasses.replace(usual, mask_truncated=True)
