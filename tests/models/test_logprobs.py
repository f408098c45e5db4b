import math

import pytest
import torch

from quartet.models.logprobs import speak_of_own_token, token_entropy, token_exact_kl, token_logprobs


def test_outputs_move_under_the_tokens_they_speak_of():
    # outputs of positions 1 and 2 of a row of 4 speak of tokens 2 and 3
    assert speak_of_own_token(torch.tensor([[7.0, 8.0]]), 4).tolist() == [[0, 0, 7, 8]]


def test_logprobs_by_hand_with_and_without_temperature():
    # logits (0, log 3): p = (1/4, 3/4); at temperature 2 they are (0, log √3): p = 1 / (1 + √3) = 0.3660
    logits, tokens = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[0]])
    assert token_logprobs(logits, tokens, 1.0).exp().item() == pytest.approx(0.25)
    assert token_logprobs(logits, tokens, 2.0).exp().item() == pytest.approx(0.3660, abs=1e-4)


def test_entropy_of_equals_is_the_log_of_their_number_and_of_certainty_zero():
    assert token_entropy(torch.zeros(1, 1, 8), 1.0).item() == pytest.approx(math.log(8))
    assert token_entropy(torch.tensor([[[1000.0, 0.0]]]), 1.0).item() == pytest.approx(0)


def test_the_exact_kl_from_logits_and_its_gradient_in_any_chunks():
    """Against autograd on the whole, in float64, with a temperature."""
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 5, 11, dtype=torch.float64)
    weights = torch.randn(3, 5, dtype=torch.float64)
    policy, ref = (logits / 0.7).log_softmax(-1), (reference / 0.7).log_softmax(-1)
    expected = (policy.exp() * (policy - ref)).sum(-1)
    expected_gradient = torch.autograd.grad((weights * expected).sum(), logits)[0]
    for chunk in (1, 4, 100):
        kl = token_exact_kl(logits, reference, 0.7, chunk)
        torch.testing.assert_close(kl, expected)
        torch.testing.assert_close(torch.autograd.grad((weights * kl).sum(), logits)[0], expected_gradient)
