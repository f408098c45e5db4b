"""A trained reward model as a reward."""

from collections.abc import Iterator, Sequence

import torch

from quartet.experience import Rollout
from quartet.models.heads import ScalarModel
from quartet.models.padding import micro_batches, right_pad


class ModelReward:
    """The reward model's score of prompt and response, at the last real token. It reads the very ids that the policy
    wrote, so policy and reward model share a tokenizer."""

    name = "model"

    def __init__(self, model: ScalarModel, micro_batch_tokens: int) -> None:
        self.model, self.micro_batch_tokens = model, micro_batch_tokens
        self.device = next(model.parameters()).device

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        scores = [0.0] * len(rollouts)
        for i, outputs in self._outputs(rollouts):
            scores[i] = outputs[-1]
        return scores

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The head read at every response token: what the model thinks once it has read that token."""
        scores: list[list[float]] = [[] for _ in rollouts]
        for i, outputs in self._outputs(rollouts):
            scores[i] = outputs[len(outputs) - len(rollouts[i].response_ids) :]
        return scores

    @torch.no_grad()
    def _outputs(self, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, list[float]]]:
        """For each rollout, in any order, the head at every real token."""
        lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            tokens, _ = right_pad([(*rollouts[i].prompt.ids, *rollouts[i].response_ids) for i in rows], self.device)
            for i, outputs in zip(rows, self.model(tokens).tolist(), strict=True):
                yield i, outputs[: lengths[i]]
