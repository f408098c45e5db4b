"""Reward models that read text: their tokenizer, or their architecture, is not the policy's."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from quartet.distributed.balance import micro_batches
from quartet.distributed.offload import NO_OFFLOAD
from quartet.experience import Rollout
from quartet.io.activity import counted
from quartet.models.actor_critic import freeze
from quartet.models.chat import conversation_ids
from quartet.models.heads import ScalarModel, load_classifier
from quartet.models.language_model import ModelError, load_tokenizer
from quartet.models.padding import right_pad
from quartet.models.precision import compute_in, label_layer
from quartet.rewards.protocol import RewardError, Score, check_model_scores

Ids = Sequence[int]


def is_decoder(model: Any) -> bool:
    """Whether a sequence classifier is read at the last token by a head called `score`, as
    transformers' decoders are. The others (BERT, DeBERTa, …) see the whole text at once, as a pair
    of request and answer."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


class TextModelReward:
    """A sequence classifier that reads prompt and response as its own tokenizer writes them.

    Conversations go through its own chat template. Plain text is joined for a decoder, with an end
    of sequence where the policy ended, and given as a pair to an encoder. Text that is longer than
    the model reads is refused, never cut.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        label: int | None,
        micro_batch_tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.folder, self.micro_batch_tokens = name, folder, micro_batch_tokens
        self.model = freeze(load_classifier(AutoModelForSequenceClassification, folder, device))
        if dtype is not None:
            compute_in(self.model, dtype, label_layer(self.model))
        self.tokenizer = load_tokenizer(folder, generates=False)
        self.label = the_label(str(folder), self.model.config.num_labels, label)
        self.scalar = (
            ScalarModel(self.model)
            if is_decoder(self.model) and self.model.config.num_labels == 1
            else None
        )
        self.placement = NO_OFFLOAD
        self.limit = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        )

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        texts = [self._ids(rollout) for rollout in rollouts]
        for rollout, (ids, _) in zip(rollouts, texts, strict=True):
            if len(ids) > self.limit:
                raise RewardError(
                    f"{rollout.id}: prompt and response have {len(ids):,} tokens for reward model "
                    f"{self.folder}, which "
                    f"reads at most {self.limit:,}. Lower data.max_prompt_tokens or "
                    f"rollout.max_new_tokens."
                )
        made = [0.0] * len(rollouts)
        with self.placement.on_device(self.model):
            pieces = micro_batches([len(ids) for ids, _ in texts], self.micro_batch_tokens)
            for rows in counted(pieces, len, len(texts), "responses"):
                scores = self._scores([texts[i] for i in rows])
                for i, score in zip(rows, scores, strict=True):
                    made[i] = score
        check_model_scores(self.name, rollouts, [[score] for score in made])
        return list(made)

    def _scores(self, texts: Sequence[tuple[Ids, Ids | None]]) -> list[float]:
        tokens, lengths = right_pad([ids for ids, _ in texts])
        if self.scalar is not None:
            found: list[float] = self.scalar.scores(tokens, lengths).tolist()
            return found
        tokens, lengths = tokens.to(self.model.device), lengths.to(self.model.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        if is_decoder(self.model):  # several labels, read at the last real token
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = self.model.score(
                hidden[torch.arange(len(texts), device=tokens.device), lengths - 1]
            )
        else:
            segments = {}
            if all(types is not None for _, types in texts):
                segments["token_type_ids"] = right_pad(
                    [types or () for _, types in texts], self.model.device
                )[0]
            logits = self.model(input_ids=tokens, attention_mask=mask.long(), **segments).logits
        picked: list[float] = logits[:, self.label].float().tolist()
        return picked

    def _ids(self, rollout: Rollout) -> tuple[Ids, Ids | None]:
        """Return the token ids, and their token types where the model has them."""
        prompt, response = rollout.prompt, rollout.response
        if prompt.messages is not None and self.tokenizer.chat_template is not None:
            reply = {"role": "assistant", "content": response}
            return conversation_ids(self.tokenizer, [*prompt.messages, reply], prompt.extra), None
        # What the texts quote of this tokenizer's control tokens is text.
        encode = partial(self.tokenizer, split_special_tokens=True)
        if is_decoder(self.model):
            ids = encode(prompt.text + response).input_ids
            end = self.tokenizer.eos_token_id
            ended = rollout.finish_reason == "stop" and end is not None
            return [*ids, end] if ended and ids[-1:] != [end] else ids, None
        pair = encode(prompt.text, response)
        return pair.input_ids, pair.get("token_type_ids")


class StepReward:
    """A token classifier that says of each step how good it is, read at the step's last token
    (Lightman et al. 2023). Two labels or more: the probability of `label`; one: its number.

    As dense rewards, each step's score stands on the last token of ours that reaches into the step;
    the response's score is their minimum, mean or last.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        separator: str,
        label: int | None,
        combine: Literal["min", "mean", "last"],
        token_texts: Callable[[Ids], list[str]],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.separator, self.combine, self.token_texts = (
            name,
            separator,
            combine,
            token_texts,
        )
        self.model = freeze(load_classifier(AutoModelForTokenClassification, folder, device))
        if dtype is not None:
            compute_in(self.model, dtype, label_layer(self.model))
        self.tokenizer = load_tokenizer(folder, generates=False)
        labels = self.model.config.num_labels
        if label is not None and label >= labels:
            raise ModelError(
                f"reward.label = {label}: {folder} has {labels} labels, counted from 0."
            )
        self.label = labels - 1 if label is None else label
        self.placement = NO_OFFLOAD
        self._last: tuple[list[Rollout], list[list[tuple[int, float]]]] = ([], [])

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [
            self._combined([score for _, score in steps]) if steps else None
            for steps in self._all_steps(rollouts)
        ]

    def _combined(self, scores: Sequence[float]) -> float:
        if self.combine == "mean":
            return sum(scores) / len(scores)
        return min(scores) if self.combine == "min" else scores[-1]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        made = []
        for rollout, steps in zip(rollouts, self._all_steps(rollouts), strict=True):
            ends = list(
                itertools.accumulate(len(text) for text in self.token_texts(rollout.response_ids))
            )
            scores = [0.0] * len(rollout.response_ids)
            for end, score in steps:
                at = next((i for i, stop in enumerate(ends) if stop >= end), len(ends) - 1)
                scores[at] += score
            made.append(scores)
        return made

    def _all_steps(self, rollouts: Sequence[Rollout]) -> list[list[tuple[int, float]]]:
        if len(rollouts) != len(self._last[0]) or any(
            a is not b for a, b in zip(rollouts, self._last[0], strict=True)
        ):
            with self.placement.on_device(self.model):
                steps = [self._steps(r) for r in rollouts]
            check_model_scores(self.name, rollouts, [[s for _, s in each] for each in steps])
            self._last = (list(rollouts), steps)
        return self._last[1]

    @torch.no_grad()
    def _steps(self, rollout: Rollout) -> list[tuple[int, float]]:
        """Return the character index at which each step of the response ends, and its score."""
        ends = step_ends(rollout.response, self.separator)
        if not ends:
            return []
        start = len(rollout.prompt.text)
        encoded = self.tokenizer(
            rollout.prompt.text + rollout.response,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        logits = (
            self.model(input_ids=torch.tensor([encoded.input_ids], device=self.model.device))
            .logits[0]
            .float()
        )
        worth = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.label]
        reaches = [(i, a, b) for i, (a, b) in enumerate(encoded.offset_mapping) if b > a]
        return [
            (end, float(worth[max(i for i, a, _ in reaches if a < start + end)])) for end in ends
        ]


def step_ends(text: str, separator: str) -> list[int]:
    """Return the index behind each step that is not empty, its separator left out: "a\\n\\nb" has
    steps that end at 1 and 4."""
    ends, start = [], 0
    for step in text.split(separator):
        if step.strip():
            ends.append(start + len(step.rstrip()))
        start += len(step) + len(separator)
    return ends


def the_label(folder: str, labels: int, label: int | None) -> int:
    """Return the index of the label that is the score."""
    if label is None and labels != 1:
        raise ModelError(
            f"{folder} has {labels} labels; a reward model needs 1. To use the first: reward.label "
            f"= 0."
        )
    if label is not None and label >= labels:
        raise ModelError(
            f"reward.label = {label}: {folder} has {labels} label{'s' * (labels != 1)}, counted "
            f"from 0."
        )
    return label or 0
