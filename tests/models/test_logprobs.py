import math

import pytest
import torch

from quartet.models import logprobs
from quartet.models.logprobs import (
    PLAIN,
    Filter,
    LogitShape,
    head_statistics,
    predicting_positions,
    scatter_to_tokens,
    token_entropy,
    token_logprobs,
)


def test_logprobs_by_hand_with_and_without_temperature():
    # logits (0, log 3): p = (1/4, 3/4); at temperature 2 they are (0, log √3): p = 1 / (1 + √3) = 0.3660
    logits, tokens = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[0]])
    assert token_logprobs(logits, tokens, 1.0).exp().item() == pytest.approx(0.25)
    assert token_logprobs(logits, tokens, 2.0).exp().item() == pytest.approx(0.3660, abs=1e-4)


def test_entropy_of_equals_is_the_log_of_their_number_and_of_certainty_zero():
    assert token_entropy(torch.zeros(1, 1, 8), 1.0).item() == pytest.approx(math.log(8))
    assert token_entropy(torch.tensor([[[1000.0, 0.0]]]), 1.0).item() == pytest.approx(0)


def test_masked_tokens_are_spoken_of_from_one_before_and_their_numbers_return_to_them():
    mask = torch.tensor([[False, True, True], [False, False, True]])
    assert predicting_positions(mask).tolist() == [[True, True, False], [False, True, False]]
    assert scatter_to_tokens(torch.tensor([7.0, 8.0, 9.0]), mask).tolist() == [[0, 7, 8], [0, 0, 9]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 13 * 5, 10**6])
@pytest.mark.parametrize(
    "shape", [PLAIN, LogitShape(0.3), LogitShape(1.0, 2.0), LogitShape(3.0, 4.0)]
)
def test_log_probs_in_chunks_are_those_of_the_whole_and_so_are_their_gradients(
    temperature, with_bias, chunk_elements, shape
):
    hidden, weight = (
        torch.randn(10, 6, dtype=torch.float64),
        torch.randn(13, 6, dtype=torch.float64),
    )
    bias, tokens = (
        torch.randn(13, dtype=torch.float64) if with_bias else None,
        torch.randint(13, (10,)),
    )
    on_logprob, on_entropy = (
        torch.randn(10, dtype=torch.float64),
        torch.randn(10, dtype=torch.float64),
    )
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = shape.scale * torch.nn.functional.linear(hidden, weight, bias)
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    logs = (logits / temperature).log_softmax(-1)
    expected = logs[range(10), tokens], -(logs.exp() * logs).sum(-1)
    measured = head_statistics(
        hidden, weight, bias, tokens, temperature, True, chunk_elements, shape
    )
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other)

    def gradients(found):
        total = on_logprob @ found[0] + on_entropy @ found[1]
        return torch.autograd.grad(total, leaves, retain_graph=True)

    for one, other in zip(gradients(measured), gradients(expected), strict=True):
        torch.testing.assert_close(one, other)
    watched, ignored = head_statistics(
        hidden, weight, bias, tokens, temperature, False, chunk_elements, shape
    )
    assert watched.requires_grad and not ignored.requires_grad
    fixed = [None if x is None else x.detach() for x in (weight, bias)]
    watched, ignored = head_statistics(
        hidden, *fixed, tokens, temperature, False, chunk_elements, shape
    )
    for one, other in zip((watched, ignored), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not ignored.requires_grad
    (slope,) = torch.autograd.grad(on_logprob @ watched, hidden)
    (whole,) = torch.autograd.grad(on_logprob @ expected[0], hidden, retain_graph=True)
    torch.testing.assert_close(slope, whole)


def test_a_head_that_is_not_trained_computes_its_logits_once(monkeypatch):
    """Two chunks, forwards and backwards: two products where a trained head takes four."""
    calls, product = [], logprobs.head_logits
    monkeypatch.setattr(logprobs, "head_logits", lambda *given: calls.append(1) or product(*given))
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
    for trained, count in ((False, 2), (True, 4)):
        calls.clear()
        weight.requires_grad_(trained)
        head_statistics(hidden, weight, None, torch.tensor([0, 7, 3]), 1.0, False, 3 * 4)[
            0
        ].sum().backward()
        assert len(calls) == count


@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 10**6])
@pytest.mark.parametrize("shape", [PLAIN, LogitShape(3.0, 4.0)])
def test_a_filter_renormalises_over_what_it_left_in_any_chunks(chunk_elements, shape):
    """At position n the ids n, n + 1, … are left; at the last, none is named and all are."""
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (8, 13))
    left = [list(range(n, 13, n + 1)) for n in range(7)]
    tokens = torch.tensor([ids[-1] for ids in left] + [4])
    limit = Filter(
        torch.tensor([n for n, ids in enumerate(left) for _ in ids]),
        torch.tensor([i for ids in left for i in ids]),
    )
    measured = head_statistics(
        hidden, weight, None, tokens, 0.7, True, chunk_elements, shape, limit
    )
    logits = shape.applied_to(torch.nn.functional.linear(hidden, weight)) / 0.7
    rows = [logits[n, ids].log_softmax(-1) for n, ids in enumerate([*left, range(13)])]
    places = [[*left, list(range(13))][n].index(int(t)) for n, t in enumerate(tokens)]
    expected = (
        torch.stack([row[place] for row, place in zip(rows, places, strict=True)]),
        torch.stack([-(row.exp() * row).sum() for row in rows]),
    )
    outer = [torch.randn(8, dtype=torch.float64) for _ in range(2)]
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        torch.autograd.grad(measured, (hidden, weight), outer),
        torch.autograd.grad(expected, (hidden, weight), outer, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    fixed = head_statistics(
        hidden, weight.detach(), None, tokens, 0.7, False, chunk_elements, shape, limit
    )
    torch.testing.assert_close(
        torch.autograd.grad(fixed[0], hidden, outer[0]),
        torch.autograd.grad(expected[0], hidden, outer[0]),
    )


def test_gradients_of_a_capped_and_scaled_head_are_its_finite_differences():
    hidden, weight, bias = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in [(4, 3), (7, 3), (7,)]
    )
    tokens = torch.tensor([0, 6, 2, 2])

    def found(*head):
        return head_statistics(*head, tokens, 0.8, True, 4 * 3, LogitShape(0.7, 1.5))

    torch.autograd.gradcheck(found, (hidden, weight, bias))
