"""The small inputs that claims share, all float32 and exact in binary, so that plain loops and
tensors start from the same numbers.

Two responses of 3 and 4 tokens, padded to 4. Advantages and log-ratios are chosen such that each
of PPO's six cases occurs: A > 0 and A < 0, with the ratio below, in and above 0.8 to 1.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_conformance.oracles import Rows

LENGTHS = (3, 4)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
REWARDS = torch.tensor([[0.0, -0.25, 1.0, 0.0], [0.5, 0.0, 0.0, -0.75]])
VALUES = torch.tensor([[0.5, 0.25, 0.75, 0.0], [-0.5, 0.125, 0.25, -0.25]])
NEW_VALUES = torch.tensor([[1.0, 0.375, 0.0, 0.0], [-0.25, -0.75, 1.5, -0.375]])
RETURNS = torch.tensor([[0.75, 0.75, 1.0, 0.0], [-0.25, -0.75, -0.75, 0.5]])
OLD = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-1.5, -0.75, -3.0, -0.25]])
LOG_RATIOS = torch.tensor([[0.125, 0.5, -0.5, 0.0], [0.125, 0.5, -0.5, -0.125]])
ADVANTAGES = torch.tensor([[1.0, 2.0, 0.5, 0.0], [-1.0, -0.5, -2.0, -0.25]])
NEW = OLD + LOG_RATIOS
REFERENCE = torch.tensor([[-1.25, -1.0, -1.5, 0.0], [-1.0, -1.5, -2.5, -0.5]])
LOSSES = torch.tensor([[1.0, -0.5, 2.0, 0.0], [0.25, 0.5, -1.0, 4.0]])

SCORES = torch.tensor([1.0, 0.0, 0.5, 0.25, -1.0, 2.0, 0.75, 1.5])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def rows(table: Tensor, mask: Tensor = MASK) -> Rows:
    """Return the numbers of each response, without padding."""
    return [row[own].tolist() for row, own in zip(table, mask, strict=True)]


def padded(table: Sequence[Sequence[float]], mask: Tensor = MASK) -> Tensor:
    """Return rows of numbers at the places of a mask, 0 elsewhere, in float64."""
    filled = torch.zeros(mask.shape, dtype=torch.float64)
    filled[mask] = torch.tensor([x for row in table for x in row], dtype=torch.float64)
    return filled


def tensors_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one flat float64 tensor."""
    return torch.cat([each.detach().double().flatten() for each in tensors])


def leaf(values: Tensor) -> Tensor:
    """Return a copy that collects a gradient."""
    return values.clone().requires_grad_()


def with_gradient(loss: Tensor, *leaves: Tensor) -> Tensor:
    """Return a loss and its gradients as one flat tensor; a leaf that the loss does not reach has
    the gradient 0."""
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return tensors_of([loss, *gradients])


def numbers(*values: float | Sequence[float]) -> Tensor:
    """Return numbers and lists of numbers as one flat float64 tensor."""
    return tensors_of([torch.tensor(each, dtype=torch.float64) for each in values])
