"""Generation in plain torch, by the very module that trains: its log-probs are the learner's up to rounding."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling, draw, sampling_logprobs
from quartet.models.padding import left_pad
from quartet.tensors import Bool, Float, Int, Tensor


class NativeGenerator:
    """Samples with a key-value cache. Each prompt is read once, however many answers it gets; rows that have finished
    leave the batch and cost nothing more."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], seed: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.rng = torch.Generator().manual_seed(seed)
        self.version = 0
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def load_weights(self, weights: Weights) -> None:
        """The module is the learner's own: its weights are loaded already."""
        self.version = weights.version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1) -> list[Rollout]:
        tokens, logprobs, lengths = self._decode([p.ids for p in prompts], sampling, samples_per_prompt)
        rollouts = []
        for row, length in enumerate(lengths.tolist()):
            prompt, sample = prompts[row // samples_per_prompt], row % samples_per_prompt
            ids = tokens[row, :length].tolist()
            rollouts.append(
                Rollout(
                    id=f"{prompt.id}/{sample}",
                    prompt=prompt,
                    group=row // samples_per_prompt,
                    response_ids=tuple(ids),
                    response=self._text(prompt, ids),
                    logprobs=tuple(logprobs[row, :length].tolist()),
                    finish_reason="stop" if ids[-1] in self.stop_ids else "length",
                    policy_version=self.version,
                )
            )
        return rollouts

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, samples: int
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Int[Tensor, "B"]]:
        """Response tokens, their log-probs, and how many of each row are real."""
        device = self.model.device
        num_rows, width = len(prompts) * samples, sampling.max_new_tokens
        noise = torch.rand(num_rows, width, generator=self.rng).to(device)
        tokens = torch.zeros(num_rows, width, dtype=torch.long, device=device)
        logprobs = torch.zeros(num_rows, width, device=device)
        lengths = torch.full((num_rows,), width, dtype=torch.long, device=device)

        cache = DynamicCache(config=self.model.config)
        ids, mask = left_pad(prompts, device)
        logits = self._forward(ids, mask, cache)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)

        rows = torch.arange(num_rows, device=device)  # which answer each row of the cache belongs to
        for t in range(width):
            drawn, logprob = draw(sampling_logprobs(logits, sampling), noise[rows, t])
            tokens[rows, t], logprobs[rows, t] = drawn, logprob
            going = ~torch.isin(drawn, self.stop_ids)
            lengths[rows[~going]] = t + 1
            if t + 1 == width or not going.any():
                break
            if not going.all():
                stay = going.nonzero()[:, 0]
                cache.batch_select_indices(stay)
                rows, drawn, mask = rows[stay], drawn[stay], mask[stay]
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            logits = self._forward(drawn[:, None], mask, cache)
        return tokens, logprobs, lengths

    def _forward(self, ids: Int[Tensor, "B n"], mask: Bool[Tensor, "B all"], cache: Any) -> Float[Tensor, "B V"]:
        """Logits after the last of the new tokens. Positions count real tokens, so padding on the left shifts nothing."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        return output.logits[:, -1]

    def _text(self, prompt: Prompt, response_ids: list[int]) -> str:
        """The response as it reads after its prompt: some tokenizers write a first word differently on its own."""
        before = self.tokenizer.decode(prompt.ids, skip_special_tokens=True)
        whole = self.tokenizer.decode([*prompt.ids, *response_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(response_ids, skip_special_tokens=True)
