"""Encodes examples as token ids. Text is tokenized here and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from quartet.data import DataError
from quartet.data.disk_rows import DiskRows
from quartet.data.examples import Example, Text
from quartet.data.records import Comparison, Demonstration
from quartet.data.report import token_pieces
from quartet.experience import Prompt
from quartet.models.chat import ChatError, render, render_turns
from quartet.models.protocols import Tokenizer

R = TypeVar("R")

LARGEST = 3.4e38
"""The largest number of float32, nearly."""


@dataclass
class Encoder:
    """Turns examples into records for one tokenizer, and refuses the rows that cannot be used, or
    drops and counts them."""

    tokenizer: Tokenizer
    max_prompt_tokens: int
    max_response_tokens: int
    max_tokens: int = 10**9
    """The longest sequence that the model reads."""
    unusable: Literal["refuse", "drop"] = "refuse"
    dropped: dict[str, str] = field(default_factory=dict)
    """What was wrong with each row that was dropped, by the row's id."""

    def prompts(self, examples: Sequence[Example]) -> Sequence[Prompt]:
        return self._all(Prompt, self._prompt, examples)

    def demonstrations(self, examples: Sequence[Example]) -> Sequence[Demonstration]:
        return self._all(Demonstration, self._demonstration, examples)

    def comparisons(self, examples: Sequence[Example]) -> Sequence[Comparison]:
        return self._all(Comparison, self._comparison, examples)

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Return the ids that the policy is given; the beginning-of-sequence token first where the
        tokenizer wants one, and once."""
        if not isinstance(prompt, str):
            return render(self.tokenizer, prompt)[0]
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        begin = self.tokenizer.bos_token_id
        wants_begin = (
            begin is not None and begin in self.tokenizer.encode("", add_special_tokens=True)[:1]
        )
        if begin is not None and wants_begin and ids[:1] != [begin]:
            return [begin, *ids]
        return ids

    def count(self, text: Text) -> int:
        """Return the tokens of a text; of a conversation, as its template writes it; of an answer
        in messages, of what they say."""
        if isinstance(text, str):
            return len(self.tokenizer.encode(text, add_special_tokens=False))
        if text[-1]["role"] == "assistant":
            return sum(self.count(message["content"]) for message in text)
        return len(self._prompt_ids(text))

    def pieces(self, example: Example) -> list[tuple[str, bool]]:
        """Return the example as the model reads it, cut where the loss begins and ends."""
        answer = next(
            (a for a in (example.completion, example.chosen, example.rejected) if a is not None),
            None,
        )
        prompt = self._prompt_ids(example.prompt)
        response, written = (
            ([], []) if answer is None else self._turns(example.prompt, answer, "answer")
        )
        return token_pieces(self.tokenizer, prompt, response, written)

    def _prompt_ids(self, prompt: Text) -> list[int]:
        try:
            return self.prompt_ids(prompt)
        except ChatError as error:
            raise DataError(str(error)) from error

    def _all(
        self, kind: type[R], encode: Callable[[Example], R], examples: Sequence[Example]
    ) -> Sequence[R]:
        records = DiskRows(kind)
        refused: dict[str, str] = {}
        for example in examples:
            try:
                records.append(encode(example))
            except DataError as error:
                refused.setdefault(example.id, str(error))
        if refused and (self.unusable == "refuse" or not records):
            others = (
                f" {len(refused) - 1:,} more rows of {len(examples):,} cannot be used."
                if len(refused) > 1
                else ""
            )
            remedy = (
                ' Mend the data, or set data.unusable = "drop" to go on without such rows.'
                if records
                else ""
            )
            raise DataError(f"{first_of(refused)}{others}{remedy}")
        self.dropped |= refused
        return records

    def _prompt(self, example: Example) -> Prompt:
        ids = self._checked_prompt(example)
        text = example.prompt if isinstance(example.prompt, str) else self.tokenizer.decode(ids)
        messages = None if isinstance(example.prompt, str) else list(example.prompt)
        return Prompt(
            id=example.id, ids=tuple(ids), text=text, extra=dict(example.extra), messages=messages
        )

    def _demonstration(self, example: Example) -> Demonstration:
        answer = example.completion if example.completion is not None else example.chosen
        assert answer is not None, "only rows with an answer are demonstrations"
        prompt, (response, written) = (
            self._checked_prompt(example),
            self._turns(example.prompt, answer, "completion"),
        )
        self._check_whole(prompt, response)
        return Demonstration(
            example.id, tuple(prompt), tuple(response), None if all(written) else tuple(written)
        )

    def _comparison(self, example: Example) -> Comparison:
        assert example.chosen is not None or example.rejected is not None, (
            "only preferences are comparisons"
        )
        if example.chosen == example.rejected:
            raise DataError(
                "chosen and rejected are identical, so there is nothing to learn from this row."
            )
        prompt = self._checked_prompt(example)
        chosen = (
            []
            if example.chosen is None
            else self._response(example.prompt, example.chosen, "chosen")
        )
        rejected = (
            []
            if example.rejected is None
            else self._response(example.prompt, example.rejected, "rejected")
        )
        self._check_whole(prompt, max(chosen, rejected, key=len))
        margin = example.extra.get("margin", 0.0)
        if (
            isinstance(margin, bool)
            or not isinstance(margin, int | float)
            or not abs(margin) <= LARGEST
        ):
            raise DataError(
                f"margin = {margin!r} is no number; it says by how much chosen is better."
            )
        return Comparison(example.id, tuple(prompt), tuple(chosen), tuple(rejected), float(margin))

    def _check_whole(self, prompt: list[int], response: list[int]) -> None:
        length = len(prompt) + len(response)
        if length > self.max_tokens:
            raise DataError(
                f"prompt and response have {length:,} tokens together, the model reads at most "
                f"{self.max_tokens:,}."
            )

    def _checked_prompt(self, example: Example) -> list[int]:
        if not example.prompt or (isinstance(example.prompt, str) and not example.prompt.strip()):
            raise DataError("the prompt is empty.")
        ids = self._prompt_ids(example.prompt)
        if len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"the prompt has {len(ids):,} tokens, the limit is {self.max_prompt_tokens:,} "
                f"(data.max_prompt_tokens)."
            )
        return ids

    def _response(self, prompt: Text, answer: Text, column: str) -> list[int]:
        """Return the ids of one answer to a prompt."""
        response, written = self._turns(prompt, answer, column)
        if not all(written):
            raise DataError(
                f"the {column} has several turns after the prompt; one answer of the assistant can "
                f"be compared."
            )
        return response

    def _turns(self, prompt: Text, answer: Text, column: str) -> tuple[list[int], list[bool]]:
        """Return the tokens that follow a prompt, and which of them are the assistant's."""
        if isinstance(answer, str):
            if not answer.strip():
                raise DataError(f"the {column} is empty, a response of zero tokens.")
            ids = [
                *self.tokenizer.encode(answer, add_special_tokens=False),
                self.tokenizer.eos_token_id,
            ]
            written = [True] * len(ids)
        else:
            said = [m for m in answer if m["role"] == "assistant"]
            if not any(m["content"].strip() or m.get("tool_calls") for m in said):
                raise DataError(f"the {column} is empty, a response of zero tokens.")
            assert not isinstance(prompt, str), "a reply in messages follows a prompt in messages"
            try:
                _, ids, written = render_turns(self.tokenizer, prompt, answer)
            except ChatError as error:
                raise DataError(str(error)) from error
        if len(ids) > self.max_response_tokens:
            raise DataError(
                f"the {column} has {len(ids):,} tokens, the limit is {self.max_response_tokens:,} "
                f"(data.max_response_tokens)."
            )
        return ids, written


def first_of(refused: dict[str, str]) -> str:
    """Return the id of the first row that was refused, and the reason."""
    place, reason = next(iter(refused.items()))
    return f"{place}: {reason}"
