"""The exact KL of a policy from its reference: a chunk of the vocabulary at a time, it is that of all logits, with the same gradient."""

import math

import pytest
import torch

from quartet.models.exact_kl import HeadInput, head_exact_kl, logits_exact_kl
from quartet.models.logprobs import PLAIN, Filter, LogitShape
from tests.support.pretended_device import COUNTS, CUDA, pretended

TOKENS, ROWS = 13, 10
SHAPES = [PLAIN, LogitShape(0.3), LogitShape(1.0, 2.0), LogitShape(3.0, 4.0)]


def head(seed, shape=PLAIN, with_bias=True, rows=ROWS):
    rng = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(*size, generator=rng, dtype=torch.float64)
        for size in [(rows, 6), (TOKENS, 6), (TOKENS,)]
    ]
    return HeadInput(parts[0], parts[1], parts[2] if with_bias else None, shape)


def learns(policy, *names):
    for name in names:
        getattr(policy, name).requires_grad_()
    return [getattr(policy, name) for name in names]


def of_logits(policy, reference, temperature, kept=None):
    logits = policy.logits()
    return logits_exact_kl(
        logits if kept is None else kept.applied_to(logits), reference.logits(), temperature
    )


def test_two_tokens_by_hand():
    """π = (0.5, 0.5), π_ref = (0.25, 0.75): 0.5 log 2 + 0.5 log ⅔ = 0.1438; at temperature 2, π_ref is (1, √3) / (1 + √3)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    policy = HeadInput(one, torch.zeros(2, 1, dtype=torch.float64))
    reference = HeadInput(one, torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64))
    root = math.sqrt(3)
    warm = 0.5 * math.log((1 + root) / 2) + 0.5 * math.log((1 + root) / 2 / root)
    for temperature, expected in [(1.0, 0.1438), (2.0, warm)]:
        for columns in (1, 2):
            kl = head_exact_kl(policy, reference, temperature, columns=columns)
            assert kl.item() == pytest.approx(expected, abs=1e-4)
        whole = logits_exact_kl(policy.logits(), reference.logits(), temperature)
        assert whole.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("columns", [1, 4, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias"), ("weight",)])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_in_chunks_it_is_that_of_all_logits(columns, shape, names, is_filtered):
    """Under adapters only hidden states learn. Of the filtered positions, one has no id in the first chunks."""
    kept = None
    if is_filtered:
        kept = Filter(torch.tensor([0, 2, 2, 5, 5]), torch.tensor([3, 12, 11, 0, 7]))
    policy, reference = head(1, shape), head(2, SHAPES[2])
    inputs, weights = learns(policy, *names), torch.randn(ROWS, dtype=torch.float64)
    ours = head_exact_kl(policy, reference, 0.7, kept, columns)
    theirs = of_logits(policy, reference, 0.7, kept)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours @ weights, inputs),
        torch.autograd.grad(theirs @ weights, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias")])
def test_gradients_are_its_finite_differences(names):
    policy, reference = head(3, LogitShape(0.7, 1.5), rows=4), head(4, rows=4)
    inputs = learns(policy, *names)

    def kl(*_):
        return head_exact_kl(policy, reference, 0.8, columns=4)

    def kl_of(hidden, weight=policy.weight, bias=policy.bias):
        given = HeadInput(hidden, weight, bias, policy.shape)
        return head_exact_kl(given, reference, 0.8, columns=4)

    assert kl().shape == (4,)
    torch.autograd.gradcheck(kl_of, tuple(inputs))


def test_equal_models_have_a_kl_of_zero_in_float32():
    """Logits of some 20, which float32 rounds by 1e-6."""
    hidden, weight = 4 * torch.randn(5, 32), torch.randn(700, 32)
    policy = HeadInput(hidden.requires_grad_(), weight)
    kl = head_exact_kl(policy, HeadInput(hidden.detach(), weight), 1.0, columns=64)
    assert kl.abs().max() < 1e-5
    kl.sum().backward()
    assert hidden.grad.abs().max() < 1e-4


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_bfloat16_has_the_gradient_of_float32_but_for_rounding(trained):
    torch.manual_seed(0)
    parts = [torch.randn(16, 32), torch.randn(300, 32) / 4, torch.randn(16, 32)]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, other = (x.bfloat16().to(dtype) for x in parts)
        policy = HeadInput(hidden, weight)
        inputs = learns(policy, *trained)
        kl = head_exact_kl(policy, HeadInput(other, weight.detach()), 1.0, columns=64)
        assert kl.dtype == torch.float32
        gradients.append([g.float() for g in torch.autograd.grad(kl.sum(), inputs)])
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight")])
def test_logits_of_all_tokens_are_never_there(names):
    """64 positions and 524,288 tokens: all logits of one model would be eight chunks of 17 MB."""
    chunk = 4 * 64 * 2**16
    with pretended() as counts:
        policy, reference = (
            HeadInput(torch.randn(64, 8).to(CUDA), torch.randn(2**19, 8).to(CUDA)) for _ in range(2)
        )
        inputs = learns(policy, *names)
        kl = head_exact_kl(policy, reference, 1.0)
        torch.autograd.grad(kl.sum(), inputs)
        counts.reset_peak()
        before = COUNTS.alive
        kl = head_exact_kl(policy, reference, 1.0)
        assert COUNTS.alive - before < chunk / 100
        torch.autograd.grad(kl.sum(), inputs)
        of_weight = 4 * 8 * 2**19 * ("weight" in names)
        assert counts.peak - before - of_weight < 4.1 * chunk


def test_no_positions_have_no_kl():
    policy = head(1, rows=0)
    inputs = learns(policy, "hidden", "weight")
    kl = head_exact_kl(policy, head(2, rows=0), 1.0)
    assert kl.shape == (0,)
    assert torch.autograd.grad(kl.sum(), inputs)[1].abs().sum() == 0
