"""Reward models that read text: their tokenizer, or their architecture, is not the policy's."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from quartet.distributed.balance import micro_batches
from quartet.distributed.offload import NO_OFFLOAD
from quartet.experience import Rollout
from quartet.io.activity import counted
from quartet.models.actor_critic import freeze
from quartet.models.classifiers import load_classifier
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, load_tokenizer
from quartet.models.padding import right_pad
from quartet.models.precision import compute_in, label_layer
from quartet.models.text_classifier import TextReader, scalar_of
from quartet.rewards.protocol import RewardError, Score, check_model_scores

Ids = Sequence[int]


class TextModelReward:
    """A sequence classifier that reads prompt and response as its own tokenizer writes them (see
    `TextReader`). Text that is longer than the model reads is refused, never cut."""

    def __init__(
        self, name: str, scalar: ScalarModel, reader: TextReader, micro_batch_tokens: int
    ) -> None:
        self.name, self.scalar, self.reader = name, scalar, reader
        self.micro_batch_tokens = micro_batch_tokens
        self.placement = NO_OFFLOAD

    @classmethod
    def load(
        cls,
        name: str,
        folder: str | Path,
        label: int | None,
        micro_batch_tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TextModelReward":
        """Return the reward of a folder or hub id, frozen, which computes in the given dtype."""
        model = freeze(load_classifier(AutoModelForSequenceClassification, folder, device))
        if dtype is not None:
            compute_in(model, dtype, label_layer(model))
        reader = TextReader.of(folder)
        index = the_label(str(folder), model.config.num_labels, label)
        return cls(name, scalar_of(model, reader.tokenizer, index), reader, micro_batch_tokens)

    @property
    def model(self) -> Any:
        """The classifier."""
        return self.scalar.model

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        texts = [self._ids(rollout) for rollout in rollouts]
        made = [0.0] * len(rollouts)
        with self.placement.on_device(self.model):
            pieces = micro_batches([len(ids) for ids in texts], self.micro_batch_tokens)
            for rows in counted(pieces, len, len(texts), "responses"):
                tokens, lengths = right_pad([texts[i] for i in rows])
                scores = self.scalar.scores(tokens, lengths).tolist()
                for i, score in zip(rows, scores, strict=True):
                    made[i] = score
        check_model_scores(self.name, rollouts, [[score] for score in made])
        return list(made)

    def _ids(self, rollout: Rollout) -> list[int]:
        """Return the ids of prompt and response. Raises RewardError if there are too many."""
        ended = rollout.finish_reason == "stop"
        ids = self.reader.ids(rollout.prompt, rollout.response, ended)
        if self.reader.too_long(ids):
            name = self.model.config.name_or_path or self.name
            raise RewardError(
                f"{rollout.id}: prompt and response have {len(ids):,} tokens for reward model "
                f"{name}, which reads at most {self.reader.limit:,}. Lower data.max_prompt_tokens "
                "or rollout.max_new_tokens."
            )
        return ids


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
        token_texts: Callable[[Ids], list[str]] | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.separator = separator
        self.combine = combine
        self.token_texts = token_texts
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
        assert self.token_texts is not None  # nothing trains on answers of an evaluation
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
