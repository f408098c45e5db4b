"""A trained reward model as a reward."""

from collections.abc import Sequence

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

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        scores = torch.zeros(len(rollouts))
        lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            tokens, real = right_pad([(*rollouts[i].prompt.ids, *rollouts[i].response_ids) for i in rows], self.device)
            scores[rows] = self.model.scores(tokens, real).cpu()
        return scores.tolist()
