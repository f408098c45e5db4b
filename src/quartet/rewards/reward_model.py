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
        self.name = name
        self.model = model
        self.micro_batch_tokens = micro_batch_tokens
        self.process_group = process_group
        self.placement = NO_OFFLOAD

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return the head's output at the last token of each response."""
        return [outputs[-1] for outputs in self._outputs(rollouts, whole=False)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return the head's output at every response token, that token included in what it has
        read."""
        return self._outputs(rollouts, whole=True)

    @torch.no_grad()
    def _outputs(self, rollouts: Sequence[Rollout], whole: bool) -> list[list[float]]:
        """Return the head's outputs for each response: at every token (`whole`), or at the last
        one."""
        own: dict[int, list[float]] = {}
        lengths = [len(r.prompt.ids) + len(r.response_ids) for r in rollouts]
        with self.placement.on_device(self.model):
            for piece in self.process_group.micro_batches(lengths, self.micro_batch_tokens):
                rows = self._read(rollouts, piece.rows, whole)
                own |= {i: outputs for i, outputs in rows if piece.counts}
        by_rank = self.process_group.all_gather(list(own.items()))
        by_row = {i: outputs for rows in by_rank for i, outputs in rows}
        outputs = [by_row[i] for i in range(len(rollouts))]
        check_model_scores(self.name, rollouts, outputs)
        return outputs

    def _read(
        self, rollouts: Sequence[Rollout], rows: Sequence[int], whole: bool
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield some rows, each with the head's outputs: at every response token (`whole`), or at
        the last one."""
        pieces = [rollouts[i] for i in rows]
        tokens, ends = right_pad([(*r.prompt.ids, *r.response_ids) for r in pieces])
        counts = [len(r.response_ids) if whole else 1 for r in pieces]
        mask = response_mask(ends - torch.tensor(counts), ends, tokens.shape[1])
        outputs = self.model(tokens, mask).cpu()  # one wait for the device
        for i, of_row in zip(rows, outputs.split(counts), strict=True):
            yield i, of_row.tolist()
