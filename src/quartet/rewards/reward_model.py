"""A trained reward model as a reward."""

from collections.abc import Sequence

import torch

from quartet.experience import Rollout
from quartet.models.heads import ScalarModel
from quartet.models.padding import response_mask, right_pad
from quartet.rewards.protocol import RewardError, Score
from quartet.team import micro_batches


class ModelReward:
    """The reward model's score of prompt and response, at the last real token. It reads the very ids that the policy
    wrote, so policy and reward model share a tokenizer."""

    def __init__(self, model: ScalarModel, micro_batch_tokens: int, name: str = "model") -> None:
        self.name, self.model, self.micro_batch_tokens = name, model, micro_batch_tokens
        self.device = next(model.parameters()).device

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [outputs[-1] for outputs in self._outputs(rollouts, whole=False)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The head read at every response token: what the model thinks once it has read that token."""
        return self._outputs(rollouts, whole=True)

    @torch.no_grad()
    def _outputs(self, rollouts: Sequence[Rollout], whole: bool) -> list[list[float]]:
        """The head at every token of each response, or at its last one."""
        outputs: list[list[float]] = [[] for _ in rollouts]
        for rows in micro_batches([len(r.prompt.ids) + len(r.response_ids) for r in rollouts], self.micro_batch_tokens):
            pieces = [rollouts[i] for i in rows]
            tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in pieces], self.device)
            counts = [len(r.response_ids) if whole else 1 for r in pieces]
            asked = response_mask(lengths - torch.tensor(counts, device=self.device), lengths, tokens.shape[1])
            for i, found in zip(rows, self.model(tokens, asked).split(counts), strict=True):
                if not bool(found.isfinite().all()):
                    raise RewardError(
                        f"reward {self.name}: the score of {rollouts[i].id} is not finite: the model's weights are wrong. "
                        f'The response is "{rollouts[i].response[:200]}".'
                    )
                outputs[i] = found.tolist()
        return outputs
