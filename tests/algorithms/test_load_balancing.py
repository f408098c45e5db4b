"""The load-balancing loss: by hand, against transformers' own function, its bounds."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from quartet.algorithms.load_balancing import Routing, expert_loads, load_balancing_loss


def test_a_worked_example():
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    routing = Routing((logits,), 1, torch.ones(2))
    assert float(routing.loss()) == pytest.approx(1.4)
    assert routing.loads().tolist() == [[2.0, 0.0]]
    # The second token is padding, then stands for three tokens of a shared prompt.
    assert float(load_balancing_loss([logits], 1, torch.tensor([1.0, 0.0]))) == pytest.approx(1.6)
    three = torch.tensor([1.0, 3.0])
    assert float(load_balancing_loss([logits], 1, three)) == pytest.approx(2 * (0.8 + 3 * 0.6) / 4)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_it_is_the_function_of_transformers_value_and_gradient(chosen):
    torch.manual_seed(0)
    layers = [torch.randn(10, 5, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    theirs = load_balancing_loss_func(tuple(layers), 5, chosen, mask)
    ours = load_balancing_loss(layers, chosen, mask.flatten().float())
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, layers) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
        assert a[[4, 8, 9]].abs().max() == 0 and a[:4].abs().min() > 0
    unmasked = load_balancing_loss_func(tuple(layers), 5, chosen)
    torch.testing.assert_close(load_balancing_loss(layers, chosen, torch.ones(10)), unmasked)


def test_it_is_least_where_loads_are_even_and_most_where_one_expert_has_all():
    even = 50 * torch.eye(4)
    assert float(load_balancing_loss([even], 1, torch.ones(4))) == pytest.approx(1.0)
    one = even[:1].expand(4, 4)
    assert float(load_balancing_loss([one], 1, torch.ones(4))) == pytest.approx(4.0)
    # Layers are taken together: each has an expert that takes all, and the loss does not see it.
    layers = [even[i : i + 1].expand(4, 4) for i in range(4)]
    assert float(load_balancing_loss(layers, 1, torch.ones(4))) == pytest.approx(1.0)
    assert expert_loads(layers, 1, torch.ones(4)).max() == 4
