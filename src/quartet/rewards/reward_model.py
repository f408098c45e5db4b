"""A trained reward model as a reward."""

from collections.abc import Iterator, Sequence

import torch

from quartet.distributed.offload import NO_OFFLOAD
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import Rollout
from quartet.models.heads import ScalarModel
from quartet.models.padding import response_mask, right_pad
from quartet.rewards.protocol import Score, check_model_scores


class ModelReward:
    """The reward model's score of prompt and response, at the last real token. It reads the very
    ids that the policy wrote, so policy and reward model share a tokenizer."""

    def __init__(
        self,
        model: ScalarModel,
        micro_batch_tokens: int,
        name: str = "model",
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """`process_group`: the ranks that have the model too; each reads its share."""
        self.name, self.model, self.micro_batch_tokens, self.process_group = (
            name,
            model,
            micro_batch_tokens,
            process_group,
        )
        self.placement = NO_OFFLOAD

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [outputs[-1] for outputs in self._outputs(rollouts, whole=False)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The head read at every response token: what the model thinks once it has read that
        token."""
        return self._outputs(rollouts, whole=True)

    @torch.no_grad()
    def _outputs(self, rollouts: Sequence[Rollout], whole: bool) -> list[list[float]]:
        """The head at every token of each response, or at its last one."""
        mine: dict[int, list[float]] = {}
        lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
        with self.placement.on_device(self.model):
            for piece in self.process_group.micro_batches(lengths, self.micro_batch_tokens):
                mine |= {
                    i: found for i, found in self._read(rollouts, piece.rows, whole) if piece.counts
                }
        everything = {
            i: found
            for rows in self.process_group.all_gather(list(mine.items()))
            for i, found in rows
        }
        outputs = [everything[i] for i in range(len(rollouts))]
        check_model_scores(self.name, rollouts, outputs)
        return outputs

    def _read(
        self, rollouts: Sequence[Rollout], rows: Sequence[int], whole: bool
    ) -> Iterator[tuple[int, list[float]]]:
        """What the head says of some rows."""
        pieces = [rollouts[i] for i in rows]
        tokens, ends = right_pad([(*r.prompt.ids, *r.response_ids) for r in pieces])
        counts = [len(r.response_ids) if whole else 1 for r in pieces]
        asked = response_mask(ends - torch.tensor(counts), ends, tokens.shape[1])
        numbers = self.model(tokens, asked).cpu()  # one wait for the device
        for i, found in zip(rows, numbers.split(counts), strict=True):
            yield i, found.tolist()
