"""A row of data in Quartet's form: text or messages, not yet token ids."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
Text = str | Sequence[Message]
"""Plain text, or a conversation: messages with `role` and `content`, and what else a template may
read."""


@dataclass(frozen=True)
class Example:
    """One row. What is absent in the row's shape is None.

    A demonstration has a completion, a comparison has chosen and rejected (an unpaired preference
    one of the two), a prompt has neither. `id` names the row for a person: file and line, or world
    and number.
    """

    id: str
    prompt: Text
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_text: bool = False
    """Whether the completion is a text without a prompt, all of which is learnt."""

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    def answers(self) -> dict[str, Text]:
        """Return the answers to the prompt by their names, those that the example has."""
        answers = {
            "completion": self.completion,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        return {name: answer for name, answer in answers.items() if answer is not None}


def score_of(example: Example) -> float | None:
    """Return the number in the column `score` of a row, or 1 or 0 for a `label` that is true or
    false; None where it has neither."""
    value = example.extra.get("score", example.extra.get("label"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
