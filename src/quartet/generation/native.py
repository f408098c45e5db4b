"""Generation in plain torch with the module that is trained, so that its log-probs equal the
learner's up to rounding."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.errors import NonFinite
from quartet.experience import Prompt, Rollout, pack_ids
from quartet.generation.cache import WIDE_WEIGHT
from quartet.generation.decoders import make_decoder
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Drawn, Sampling, draw
from quartet.generation.stops import StopStrings, StopWatch
from quartet.io.activity import progress
from quartet.io.heap import holds_for_a_while
from quartet.models.adapters import REWARD
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.models.support import ids_outside, support_of
from quartet.models.text import decoded_response
from quartet.tensors import Bool, Float, Int, Tensor

Answer = tuple[list[int], list[float], list[float], list[str]]
"""The tokens of a response, their log-probs and entropies, and the ids that the filter left before
each, where they are kept."""


class NativeGenerator:
    """Samples with a key-value cache. Each prompt is prefilled once for all of its samples.
    Finished rows leave the batch, and waiting prompts take their place."""

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        seed: int,
        max_rows: int | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        copied: bool = False,
    ) -> None:
        """`max_rows` bounds the responses that are sampled together; by default memory bounds them.
        `process_group`: the ranks that share the prompts; each returns all responses. A response's
        random numbers do not depend on the rank that samples it. `copied`: the model is a copy of
        the learner's, and new weights are copied into it."""
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.process_group = process_group
        self.copied = copied
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.rng = torch.Generator().manual_seed(seed)
        self.version = 0

    @property
    def excluded(self) -> list[int]:
        """The ids outside of the policy's support, which no generator may sample."""
        return list(ids_outside(self.model))

    def load_weights(self, weights: Weights) -> None:
        """Copy new weights into the model. Where the module is the learner's own, it has them."""
        if self.copied:
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    # Reward models may be adapters on the copy, and never change.
                    if f".{REWARD}." not in name and f".{REWARD}-" not in name:
                        tensor.copy_(weights.tensors[name])
        self.version = weights.version

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state(), "version": self.version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.rng.set_state(state["rng"])
        self.version = state["version"]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        """Return `samples_per_prompt` answers to each prompt, those to one prompt next to each
        other. Raises `NonFinite`, on every rank, with the first answer that the model gave no
        distribution for."""
        noise = torch.rand(
            len(prompts) * samples_per_prompt, sampling.max_new_tokens, generator=self.rng
        )
        mine = self.process_group.share([len(p.ids) for p in prompts])
        rows = [
            row for i in mine for row in range(i * samples_per_prompt, (i + 1) * samples_per_prompt)
        ]
        with holds_for_a_while(self._bytes_of_decoder()):
            own_answers = self._sample(
                [prompts[i].ids for i in mine], sampling, samples_per_prompt, noise[rows]
            )
        by_rank = (
            self.process_group.all_gather([rows, own_answers])
            if self.process_group.world_size > 1
            else [(rows, own_answers)]
        )
        by_row = {
            row: answer
            for rank_rows, rank_answers in by_rank
            for row, answer in zip(rank_rows, rank_answers, strict=True)
        }
        answers = [by_row[row] for row in range(len(noise))]
        before = [self.tokenizer.decode(p.ids, skip_special_tokens=True) for p in prompts]
        rollouts = []
        for row, answer in enumerate(answers):
            group, sample = divmod(row, samples_per_prompt)
            prompt = prompts[group]
            rollouts.append(self.as_rollout(prompt, group, sample, answer, before[group], sampling))
        return rollouts

    def _bytes_of_decoder(self) -> int:
        """Return the main memory of a decoder's weights, which it has in a layout of its own."""
        if self.model.device.type != "cpu":
            return 0
        return sum(p.nbytes for p in self.model.parameters() if p.numel() < WIDE_WEIGHT)

    def as_rollout(
        self,
        prompt: Prompt,
        group: int,
        sample: int,
        answer: Answer,
        before: str,
        sampling: Sampling,
    ) -> Rollout:
        """Return an answer as a rollout, cut off behind its first stop string. `before` is the
        prompt decoded."""
        name, stops = f"{prompt.id}/{sample}", StopStrings(self.tokenizer, sampling.stop)
        ids, logprobs, entropies, kept = answer
        if not all(map(math.isfinite, logprobs)):
            raise NonFinite("the log-probability", name, [*prompt.ids, *ids])
        length = stops.length(prompt.ids, ids, before)
        ids, logprobs = ids[:length], logprobs[:length]
        entropies, kept = entropies[:length], kept[:length]
        text = decoded_response(self.tokenizer, prompt.ids, ids, before)
        has_ended = length is not None or ids[-1] in self.stop_ids
        return Rollout(
            id=name,
            prompt=prompt,
            group=group,
            response_ids=tuple(ids),
            response=stops.text_before(text),
            logprobs=tuple(logprobs),
            entropies=tuple(entropies),
            finish_reason="stop" if has_ended else "length",
            policy_version=self.version,
            kept=tuple(kept) if sampling.keep_mask else None,
        )

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        samples: int,
        noise: Float[Tensor, "B T"],
    ) -> list[Answer]:
        """Return the answer of each response; `noise` has the uniform number of each token."""
        if not prompts:
            return []
        device, limit = self.model.device, sampling.max_new_tokens
        support = support_of(self.model)
        noise, ends = noise.to(device), self.stop_ids[self.stop_ids < (support or math.inf)]
        stops = StopStrings(self.tokenizer, sampling.stop)
        watch = StopWatch(stops, [p for p in prompts for _ in range(samples)])
        decoder = make_decoder(self.model, max(map(len, prompts)) + limit, self.max_rows)
        waiting = deque(range(len(prompts)))
        rows = torch.empty(
            0, dtype=torch.long, device=device
        )  # the answer that each row of the decoder belongs to
        lengths = torch.empty(0, dtype=torch.long, device=device)  # tokens of it so far
        alive = torch.empty(0, dtype=torch.bool, device=device)  # whether it goes on
        logits = torch.empty(0, 0, device=device)
        steps: list[Step] = []
        unseen = 0  # tokens since the ends of rows were looked at
        num_tokens = 0
        while len(rows) or waiting:
            if waiting and (not len(rows) or decoder.free_rows() >= samples):
                chosen = [
                    waiting.popleft()
                    for _ in range(min(len(waiting), max(decoder.free_rows() // samples, 1)))
                ]
                new = decoder.prefill([prompts[i] for i in chosen], samples)
                logits = torch.cat([logits, new]) if len(rows) else new
                first = samples * torch.tensor(chosen)
                added = (first[:, None] + torch.arange(samples)).flatten().to(device)
                rows = torch.cat([rows, added])
                lengths = torch.nn.functional.pad(lengths, (0, len(new)))
                alive = torch.nn.functional.pad(alive, (0, len(new)), value=True)
            noises = noise[rows, lengths.clamp(max=limit - 1)]
            possible = logits[:, :support]
            if sampling.min_new_tokens:
                possible = _without(ends, possible, lengths < sampling.min_new_tokens)
            drawn = self._draw(possible, sampling, noises, rows, lengths)
            left = [] if drawn.kept is None else _packed_rows(drawn.kept)
            steps.append((rows, alive, replace(drawn, kept=None), left))
            num_tokens += len(rows)
            progress(num_tokens, 0, "tokens")
            lengths = lengths + alive
            tokens = drawn.tokens
            alive = alive & ~(torch.isin(tokens, self.stop_ids) | (lengths == limit))
            if stops.strings:
                alive = watch.unfinished(rows, tokens, alive)
            unseen += 1
            if unseen >= decoder.look_every and not alive.all():
                kept = decoder.keep(alive)
                rows, lengths, tokens, alive = rows[kept], lengths[kept], tokens[kept], alive[kept]
            unseen %= decoder.look_every
            if len(rows):
                logits = decoder.step(tokens)
        return _by_row(steps, len(prompts) * samples)

    def _draw(
        self,
        logits: Float[Tensor, "B V"],
        sampling: Sampling,
        noise: Float[Tensor, "B"],
        rows: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"],
    ) -> Drawn:
        """Draw a token for each row. Row i continues response `rows[i]`, which has `lengths[i]`
        tokens; the draw depends on neither here, but a benchmark ends responses by both."""
        return draw(logits, sampling, noise)


Step = tuple[Tensor, Tensor, Drawn, list[str]]
"""The answer of each row, whether it goes on, the token that was drawn for it, and the ids that the
filter left, where they are kept."""


def _without(
    ids: Int[Tensor, "n"], logits: Float[Tensor, "B V"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, "B V"]:
    """Return logits in which these ids cannot be drawn in some rows."""
    return logits.index_copy(1, ids, logits[:, ids].masked_fill(rows[:, None], -torch.inf))


def _packed_rows(kept: Bool[Tensor, "B V"]) -> list[str]:
    """Return the ids that a filter left in each row."""
    ids = kept.nonzero()[:, 1].to(torch.int32).cpu().numpy().tobytes()
    ends = (4 * kept.sum(-1).cumsum(0)).tolist()
    return [pack_ids(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _by_row(steps: Sequence[Step], num_rows: int) -> list[Answer]:
    """Sort what was drawn step by step into the answers of the responses."""
    rows = torch.cat([rows for rows, *_ in steps]).cpu()
    order = rows.sort(stable=True).indices
    order = order[torch.cat([alive for _, alive, *_ in steps]).cpu()[order]]
    ends = rows[order].bincount(minlength=num_rows).cumsum(0).tolist()
    columns = [
        torch.cat([getattr(drawn, name) for _, _, drawn, _ in steps]).cpu()[order].tolist()
        for name in ("tokens", "logprobs", "entropies")
    ]
    kept = [each for *_, left in steps for each in left]
    columns.append([kept[i] for i in order.tolist()] if kept else [])
    spans = list(zip([0, *ends], ends, strict=False))
    return [tuple(column[start:end] for column in columns) for start, end in spans]  # type: ignore[misc]
