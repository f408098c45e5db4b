"""Rollouts as a batch of tensors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quartet.experience import Batch, KeptIds, Rollout
from quartet.models.padding import response_mask, right_pad, spread
from quartet.tensors import Tensor


def collate(rollouts: Sequence[Rollout], device: torch.device | None = None) -> Batch:
    """Return the rollouts as one batch, padded on the right, in main memory if no device is given.

    Until the learner computes its own, `old_logprobs` are the log-probs that the sampler took.
    """
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts], device)
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts], device=device)
    mask = response_mask(starts, lengths, tokens.shape[1])
    for row, r in enumerate(rollouts):
        if r.policy_mask is not None:  # an environment wrote the other tokens of the response
            start, end = len(r.prompt.ids), len(r.prompt.ids) + len(r.policy_mask)
            mask[row, start:end] &= torch.tensor(r.policy_mask, device=device)
    logprobs = spread([_on_policy_tokens(r.logprobs, r) or () for r in rollouts], mask)
    return Batch(
        ids=tuple(r.id for r in rollouts),
        tokens=tokens,
        lengths=lengths,
        response_mask=mask,
        scores=torch.tensor(
            [math.nan if r.score is None else r.score for r in rollouts],
            dtype=torch.float32,
            device=device,
        ),
        ended=torch.tensor([r.finish_reason == "stop" for r in rollouts], device=device),
        groups=torch.tensor([r.group for r in rollouts], device=device),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        entropy=_if_complete(
            [_on_policy_tokens(r.entropies, r) for r in rollouts], lambda rows: spread(rows, mask)
        ),
        token_scores=_if_complete(
            [_on_policy_tokens(r.token_scores, r) for r in rollouts],
            lambda rows: spread(rows, mask),
        ),
        greedy_scores=_if_complete(
            [r.greedy_score for r in rollouts],
            lambda scores: torch.tensor(scores, dtype=torch.float32, device=device),
        ),
        state_values=_if_complete(
            [_on_policy_tokens(_numbers(r.state_values), r) for r in rollouts],
            lambda rows: spread(rows, mask),
        ),
        kept=KeptIds.of(rollouts, tokens.shape[1]),
    )


def _on_policy_tokens(numbers: Sequence[float] | None, rollout: Rollout) -> Sequence[float] | None:
    """Return the numbers of those response tokens that the policy wrote."""
    if numbers is None or rollout.policy_mask is None:
        return numbers
    return [number for number, own in zip(numbers, rollout.policy_mask, strict=True) if own]


def _numbers(values: Sequence[float | None] | None) -> list[float] | None:
    """Return values with NaN for None."""
    return None if values is None else [math.nan if v is None else v for v in values]


def _if_complete(values: Sequence[Any], to_tensor: Callable[[Any], Tensor]) -> Tensor | None:
    """Return the values as a tensor, or None where a rollout has none."""
    return None if any(value is None for value in values) else to_tensor(values)
