"""Stand-ins for the trainers whose methods hold a library's formulas.

The method is the library's own; what it reads from `self` is given here: the library's defaults,
one process, and a model whose outputs are the tensors of a claim.
"""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def defaults(config: type) -> SimpleNamespace:
    """Return the defaults of a config's fields, without the checks that making one does."""
    values = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return SimpleNamespace(**values)


class Accelerator:
    """One of `num_processes` processes that all hold the same."""

    device = torch.device("cpu")
    process_index = 0
    sync_gradients = True

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor


class Metrics(defaultdict[str, Any]):
    """Whatever a trainer logs, at any depth."""

    def __init__(self) -> None:
        super().__init__(lambda: defaultdict(list))


class Model(torch.nn.Module):
    """A model that gives the same outputs for any inputs."""

    is_gradient_checkpointing = False

    def __init__(self, outputs: Any = None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs


def sums_as_outputs(sums: Tensor, tokens: Tensor, mask: Tensor) -> SimpleNamespace:
    """Return what a language model of two ids would give for responses whose log-probs add up to
    `sums` [B], the same for each of their `tokens` [B]: logits, and for trainers with a fused head
    its log-probs, 0 outside the mask [B T]."""
    per_token = (sums / tokens)[:, None]
    # A logit x beside 0 gives id 0 the log-prob log σ(x).
    logit = per_token - torch.log(-torch.expm1(per_token))
    logits = torch.stack([logit, torch.zeros_like(logit)], dim=-1).expand(*mask.shape, 2)
    zeros = torch.zeros(mask[:, 1:].shape)
    return SimpleNamespace(
        logits=logits,
        log_probs=torch.where(mask[:, 1:].bool(), per_token, 0.0),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
