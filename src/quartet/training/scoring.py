"""What actor, critic and reference compute for every token of a batch, before an update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.distributed.process_group import ProcessGroup
from quartet.experience import Batch, Experience, KeptIds
from quartet.models.actor_critic import ActorCritic, ForwardRequest
from quartet.models.adapters import LanguageModel
from quartet.models.forward import policy_logprobs, prompts
from quartet.models.padding import PAD
from quartet.tensors import Bool, Float, Tensor

AGREEMENT = 1e-4
"""The largest |ratio − 1| of the learner's probability of a token to the sampler's at which the two
agree: more than float32 rounding in deep models, less than other weights, another temperature or a
filter of the vocabulary would give."""


class TokenScores:
    """The outputs of the models for a batch; each tensor is 0 outside the response tokens."""

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        self.batch = batch
        self.logprobs, self.entropy, self.exact_kl, self.values = (
            torch.zeros(batch.tokens.shape, dtype=dtype, device=batch.tokens.device)
            for _ in range(4)
        )
        self.final_values = torch.zeros(len(batch.ids), dtype=dtype, device=batch.tokens.device)
        """The value after the last token of each row, where the algorithm needs it."""

    def put(
        self, rows: list[int], forward: Forward | None, values: Float[Tensor, "b t"] | None
    ) -> None:
        """Fill in some rows. `values` has one column more where it includes the final values."""
        lengths = self.batch.lengths[rows]
        width = int(lengths.max())
        mask = self.batch.response_mask[rows, :width]
        outputs = {"values": values}
        if forward is not None:
            outputs |= {
                "logprobs": forward.logprobs,
                "entropy": forward.entropy,
                "exact_kl": forward.exact_kl,
            }
        for name, numbers in in_main_memory(outputs).items():
            getattr(self, name)[rows, :width] = torch.where(mask, numbers[:, :width], 0.0)
            if name == "values" and numbers.shape[1] > width:
                self.final_values[rows] = numbers.gather(1, lengths[:, None])[:, 0]


def in_main_memory(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return those of some tensors of one shape that are not None, in main memory. Together they
    cost one wait for their device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if all(tensor.device.type == "cpu" for tensor in given.values()):
        return given
    return dict(zip(given, torch.stack(list(given.values())).cpu(), strict=True))


@dataclass(frozen=True)
class Scorer:
    """The models that score a batch, and the temperature that log-probs are taken at."""

    models: ActorCritic
    reference: LanguageModel | None
    temperature: float
    process_group: ProcessGroup

    def score(
        self, batch: Batch, algorithm: Algorithm, micro_batch_tokens: int, only_values: bool
    ) -> TokenScores:
        """Return what actor and critic compute for the batch, gathered from all ranks.

        With `only_values` the actor does not run; its log-probs and entropies are known already.
        """
        dtype = torch.promote_types(self.models.actor.dtype, torch.float32)
        scores = TokenScores(batch, dtype)
        for micro_batch in self.process_group.micro_batches(
            batch.lengths.tolist(), micro_batch_tokens, prompts(batch.tokens, batch.response_mask)
        ):
            outputs = self._forward(batch, micro_batch.rows, algorithm, only_values)
            if micro_batch.counts:
                scores.put(micro_batch.rows, *outputs)
        # Each rank has filled in its own rows of tensors of zeros.
        self.process_group.all_reduce(
            scores.logprobs, scores.entropy, scores.exact_kl, scores.values, scores.final_values
        )
        return scores

    def logprobs(
        self,
        model: Any,
        rows: Batch | Experience,
        micro_batch_tokens: int,
        kept: KeptIds | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the log-probs that a model gives to the response tokens. `kept` limits it to the
        ids that the sampler's filter left."""
        return policy_logprobs(
            model,
            rows.tokens,
            rows.lengths,
            rows.response_mask,
            self.temperature,
            micro_batch_tokens,
            self.process_group,
            kept,
        )

    def _forward(
        self, batch: Batch, rows: Sequence[int], algorithm: Algorithm, only_values: bool
    ) -> tuple[Forward | None, Float[Tensor, "b t"] | None]:
        """Return the outputs of actor and critic for some rows."""
        lengths = batch.lengths[list(rows)]
        width = int(lengths.max())
        tokens, mask = batch.tokens[list(rows), :width], batch.response_mask[list(rows), :width]
        if algorithm.needs_final_values:
            # The value after the last token is the value before a token that was never sampled: one
            # column of padding makes room for it.
            tokens = torch.nn.functional.pad(tokens, (0, 1), value=PAD)
            mask = torch.nn.functional.pad(mask, (0, 1)).scatter(1, lengths[:, None], True)
        if only_values:
            return None, self.models.values(tokens, mask)
        reference = self.reference if algorithm.kl.exact_reward else None
        kept = None if batch.kept is None else batch.kept.rows(rows, width)
        request = ForwardRequest(tokens, mask, self.temperature, reference=reference, kept=kept)
        forward = Forward.joined(self.models.forward_passes(request))
        return forward, forward.values


def logprobs_agree(
    a: Float[Tensor, "B T"], b: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> bool:
    """Return whether two policies give every token the same probability, up to `AGREEMENT`."""
    return float(((a - b).expm1().abs() * mask).max()) <= AGREEMENT
