"""Encodes examples as token ids. Text is tokenized here and nowhere else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from quartet.data import DataError
from quartet.data.disk_rows import DiskRows
from quartet.data.examples import Example, Text, score_of
from quartet.data.limits import TooLong, TooLongRows, Truncation
from quartet.data.records import Comparison, Demonstration
from quartet.data.report import token_pieces
from quartet.experience import Prompt
from quartet.io.activity import activity, counted
from quartet.models.chat import (
    NO_COLUMNS,
    ChatError,
    Columns,
    HistoryRewritten,
    check_variables,
    render,
    render_turns,
)
from quartet.models.protocols import Tokenizer
from quartet.models.text import decoded_response, quoted_control, response_ids, text_ids
from quartet.models.text_classifier import TextReader

R = TypeVar("R")

EncodedRow = tuple[list[int], list[int], list[bool]]
"""A prompt, a response, and which of the response's tokens are the assistant's."""
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
    prompt_limit: str = ""
    """How the limit of prompts came about, where it is not `data.max_prompt_tokens`: "128 = 256
    (policy.create.max_length) - 128 (rollout.max_new_tokens)"."""
    unusable: Literal["refuse", "drop"] = "refuse"
    too_long: TooLongRows | None = None
    """What is done with rows over a limit; None: the same as with others that cannot be used."""
    dropped: dict[str, str] = field(default_factory=dict)
    """What was wrong with each row that was dropped, by the row's id."""
    quoting: dict[str, str] = field(default_factory=dict)
    """The control token that a row quotes in its text, by the row's id."""
    unknown: list[str] = field(default_factory=list)
    """The ids of rows with text that the tokenizer has no token for."""
    divided: dict[str, int] = field(default_factory=dict)
    """The number of demonstrations that a conversation became, by the row's id, where the template
    rewrites earlier answers."""

    sides: set[str] = field(default_factory=set)
    """Which of chosen and rejected the preferences have had."""
    truncation: Truncation = field(init=False)

    def __post_init__(self) -> None:
        self.truncation = Truncation(self.too_long)

    def prompts(self, examples: Sequence[Example]) -> Sequence[Prompt]:
        return self._all(Prompt, lambda example: [self._prompt(example)], examples)

    def demonstrations(self, examples: Sequence[Example]) -> Sequence[Demonstration]:
        return self._all(Demonstration, self._demonstrations, examples)

    def comparisons(self, examples: Sequence[Example]) -> Sequence[Comparison]:
        records = self._all(Comparison, lambda example: [self._comparison(example)], examples)
        for example in examples:
            self.sides |= {side for side in ("chosen", "rejected") if getattr(example, side)}
        return records

    def comparisons_for(
        self, reader: TextReader, examples: Sequence[Example]
    ) -> tuple[Sequence[Comparison], Sequence[Comparison]]:
        """Return the comparisons as a reward model with its own tokenizer reads them, and the same
        in the policy's tokens. Of the former, each side is a whole text, prompt included."""
        own = DiskRows(Comparison)

        def encode(example: Example) -> list[Comparison]:
            comparison = self._comparison(example)
            own.append(self._as_read(reader, self._prompt(example), comparison))
            return [comparison]

        policys = self._all(Comparison, encode, examples)
        return own, policys

    def _as_read(self, reader: TextReader, prompt: Prompt, comparison: Comparison) -> Comparison:
        """Return a comparison in the tokens of a reader, which is given the texts that it would be
        given if the policy had sampled them."""
        chosen, rejected = (
            tuple(reader.ids(prompt, decoded_response(self.tokenizer, prompt.ids, ids), ended=True))
            for ids in (comparison.chosen_ids, comparison.rejected_ids)
        )
        longest = max(chosen, rejected, key=len)
        if reader.too_long(longest):
            raise DataError(
                f"prompt and response have {len(longest):,} tokens together for "
                f"reward_model.model, which reads at most {reader.limit:,}."
            )
        if chosen == rejected:
            raise DataError(
                "chosen and rejected are identical for the tokenizer of reward_model.model, so "
                "there is nothing to learn from this row."
            )
        return Comparison(comparison.id, (), chosen, rejected, comparison.margin)

    def prompt_ids(self, prompt: Text, columns: Columns = NO_COLUMNS) -> list[int]:
        """Return the ids that the policy is given; the beginning-of-sequence token first where the
        tokenizer wants one, and once. `columns` are the other columns of a conversation's row."""
        if not isinstance(prompt, str):
            check_variables(self.tokenizer, columns.get("chat_template_kwargs") or {})
            return render(self.tokenizer, prompt, columns=columns)[0]
        begin = self.tokenizer.bos_token_id
        wants_begin = (
            begin is not None and begin in self.tokenizer.encode("", add_special_tokens=True)[:1]
        )
        if begin is None or not wants_begin:
            return text_ids(self.tokenizer, prompt)
        return [
            begin,
            *text_ids(self.tokenizer, prompt.removeprefix(str(self.tokenizer.bos_token))),
        ]

    def sizes(self, example: Example) -> dict[str, int]:
        """Return the tokens of each part of an example as a run counts them: with what the template
        writes and the ends of turns; of a conversation that becomes several rows, up to the last
        answer. A text that is empty has none. Raises DataError for rows that cannot be used."""
        if example.is_text:
            assert isinstance(example.completion, str), "a text has no messages"
            return {"completion": len(self.prompt_ids(example.completion)) + 1}
        prompt = self._prompt_ids(example.prompt, example.extra) if example.prompt else []
        sizes = {"prompt": len(prompt)}
        for part, answer in example.answers().items():
            if isinstance(answer, str) and not answer.strip():
                sizes[part] = 0
            elif part == "completion":
                before, response, _ = self._answered(example, prompt, answer, part)[-1]
                sizes[part] = len(before) - len(prompt) + len(response)
            else:
                sizes[part] = len(self._response(example, answer, part))
        return sizes

    def pieces(self, example: Example) -> list[tuple[str, bool]]:
        """Return the example as the model reads it, cut where the loss begins and ends; of a
        conversation that becomes several rows, the last."""
        answer = next(iter(example.answers().values()), None)
        prompt = self._prompt_ids(example.prompt, example.extra)
        if answer is None:
            return token_pieces(self.tokenizer, prompt, [], [])
        last = self._answered(example, prompt, answer, "answer")[-1]
        return token_pieces(self.tokenizer, *last)

    def oddities(self, example: Example) -> dict[str, str]:
        """Return what the user should know of an example's texts: "control" with the first control
        token that they quote, "unknown" with the token of what the tokenizer has no token for."""
        found, unknown = {}, self._unknown_id
        if (control := self._quoted(example)) is not None:
            found["control"] = control
        if unknown is not None and any(
            unknown in text_ids(self.tokenizer, text) for text in texts_of(example)
        ):
            found["unknown"] = self.tokenizer.convert_ids_to_tokens([unknown])[0]
        return found

    @property
    def _unknown_id(self) -> int | None:
        return getattr(self.tokenizer, "unk_token_id", None)

    def _quoted(self, example: Example) -> str | None:
        """Return the first control token that the texts of an example quote."""
        tools = [example.extra.get("tools")] if example.conversational else []
        texts = _texts_in([example.prompt, *example.answers().values(), *tools])
        tokens = (quoted_control(self.tokenizer, text) for text in texts)
        return next((token for token in tokens if token is not None), None)

    def notes(self) -> Iterator[str]:
        """Yield sentences about the rows that were encoded, for the user to read."""
        if self.dropped:
            rows, were = ("row", "was") if len(self.dropped) == 1 else ("rows", "were")
            yield (
                f"{len(self.dropped):,} {rows} cannot be used and {were} left out, the first: "
                f"{first_of(self.dropped)}"
            )
        if self.truncation.rows:
            yield (
                f"{len(self.truncation.rows):,} rows were truncated (data.too_long), the first: "
                f"{first_of(self.truncation.rows)}"
            )
        if self.quoting:
            place, token = next(iter(self.quoting.items()))
            yield (
                f"{len(self.quoting):,} rows quote a control token, the first: {place} ({token}). "
                "It is encoded as text: only the chat template writes control tokens."
            )
        if self.unknown:
            yield (
                f"{len(self.unknown):,} rows have text that the tokenizer has no token for, the "
                f"first: {self.unknown[0]}. The policy reads "
                f"{getattr(self.tokenizer, 'unk_token', None)} there."
            )
        if len(self.sides) == 1:
            yield (
                f"every label is {'true' if 'chosen' in self.sides else 'false'}: KTO learns from "
                "the difference between good and bad completions."
            )
        if self.divided:
            yield (
                f"{len(self.divided):,} conversations became {sum(self.divided.values()):,} "
                "demonstrations, one for each answer: the chat template writes earlier answers "
                "differently once later turns follow."
            )

    def _prompt_ids(self, prompt: Text, columns: Columns) -> list[int]:
        try:
            return self.prompt_ids(prompt, columns)
        except ChatError as error:
            raise DataError(str(error)) from error

    @activity("tokenizing")
    def _all(
        self, kind: type[R], encode: Callable[[Example], Sequence[R]], examples: Sequence[Example]
    ) -> Sequence[R]:
        records = DiskRows(kind)
        refused: dict[str, str] = {}
        dropped: dict[str, str] = {}
        rows = counted(examples, lambda _: 1, len(examples), "rows")
        for example in rows:
            try:
                encoded = encode(example)
            except DataError as error:
                unused = refused if self._handling(error) == "refuse" else dropped
                unused.setdefault(example.id, str(error))
                continue
            for record in encoded:
                records.append(record)
            self._look(example, encoded)
        if not records:
            refused |= dropped
        if refused:
            others = (
                f" {len(refused) - 1:,} more row{'s' * (len(refused) != 2)} of {len(examples):,} "
                "cannot be used."
                if len(refused) > 1
                else ""
            )
            key = "data.unusable" if self.unusable == "refuse" else "data.too_long"
            remedy = (
                f' Mend the data, or set {key} = "drop" to go on without such rows.'
                if records
                else ""
            )
            raise DataError(f"{first_of(refused)}{others}{remedy}")
        self.dropped |= dropped
        return records

    def _handling(self, error: DataError) -> str:
        """Return what is done with a row that cannot be used: "refuse" or "drop"."""
        if isinstance(error, TooLong) and self.too_long in {"refuse", "drop"}:
            return str(self.too_long)
        return self.unusable

    def _look(self, example: Example, records: Sequence[Any]) -> None:
        """Remember what the user should know of a row."""
        if (token := self._quoted(example)) is not None:
            self.quoting.setdefault(example.id, token)
        unknown = self._unknown_id
        if unknown is not None and any(unknown in ids for r in records for ids in ids_of(r)):
            self.unknown.append(example.id)
        if len(records) > 1:
            self.divided[example.id] = len(records)

    def _prompt(self, example: Example) -> Prompt:
        ids = self._checked_prompt(example)
        text = example.prompt
        if not isinstance(text, str) or example.id in self.truncation.rows:
            begins = isinstance(text, str) and ids[0] == self.tokenizer.bos_token_id
            text = self.tokenizer.decode(ids[begins:])
        messages = None if isinstance(example.prompt, str) else list(example.prompt)
        return Prompt(
            id=example.id, ids=tuple(ids), text=text, extra=dict(example.extra), messages=messages
        )

    def _demonstrations(self, example: Example) -> list[Demonstration]:
        """Return the demonstrations of a row: one, or one for each answer of a conversation whose
        template rewrites what came before the last."""
        answer = example.completion if example.completion is not None else example.chosen
        assert answer is not None, "only rows with an answer are demonstrations"
        first = [] if example.is_text else self._checked_prompt(example)
        rows = self._answered(example, first, answer, "completion")
        made = []
        for number, (prompt, answered, learnt) in enumerate(rows, 1):
            response, written = self._fitting(example, prompt, answered, learnt)
            name = example.id if len(rows) == 1 else f"{example.id}, answer {number}"
            mask = None if all(written) else tuple(written)
            made.append(
                Demonstration(name, tuple(prompt), tuple(response), mask, score_of(example))
            )
        return made

    def _answered(
        self, example: Example, prompt: list[int], answer: Text, column: str
    ) -> list[EncodedRow]:
        """Return the rows that a prompt and its answer become; `prompt` is the prompt encoded."""
        if example.is_text:
            return [self._running_text(example, answer, column)]
        try:
            return [(prompt, *self._turns(example, answer, column))]
        except HistoryRewritten:
            assert not isinstance(answer, str) and not isinstance(example.prompt, str)
            if example.id in self.truncation.rows:
                raise TooLong(
                    "the prompt is too long, and cannot be cut: the chat template writes it "
                    "differently once later turns follow."
                ) from None
            return list(self._one_by_one(example, prompt, answer, column))

    def _one_by_one(
        self, example: Example, first: list[int], turns: Sequence[Mapping[str, Any]], column: str
    ) -> Iterator[EncodedRow]:
        """Yield a row for each answer, with all that comes before it as its prompt. What follows
        the `first` prompt is bounded as a response is, as it would be in one row."""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = [*example.prompt, *turns[:number]]
            try:
                prompt, response, written = render_turns(
                    self.tokenizer, before, [turn], example.extra
                )
            except ChatError as error:
                raise DataError(str(error)) from error
            before_it = len(prompt) - len(first)
            if number and self.truncation.is_on and before_it >= self.max_response_tokens:
                return  # as in one row, which ends there
            yield prompt, *self._bounded(example, response, written, column, before_it)

    def _running_text(self, example: Example, text: Text, column: str) -> EncodedRow:
        """Return a text all of which is learnt. Something must come before its first learnt token:
        the beginning-of-sequence token, or else the text's own first token."""
        assert isinstance(text, str)
        if not text.strip():
            raise DataError(f"the {column} is empty, a response of zero tokens.")
        ids = [*self.prompt_ids(text), self.tokenizer.eos_token_id]
        return ids[:1], *self._bounded(example, ids[1:], [True] * (len(ids) - 1), column)

    def _comparison(self, example: Example) -> Comparison:
        assert example.chosen is not None or example.rejected is not None, (
            "only preferences are comparisons"
        )
        if example.chosen == example.rejected:
            raise DataError(
                "chosen and rejected are identical, so there is nothing to learn from this row."
            )
        prompt = self._checked_prompt(example)
        chosen = [] if example.chosen is None else self._response(example, example.chosen, "chosen")
        rejected = (
            []
            if example.rejected is None
            else self._response(example, example.rejected, "rejected")
        )
        chosen, rejected = (
            self._fitting(example, prompt, side, [True] * len(side))[0]
            for side in (chosen, rejected)
        )
        if chosen == rejected and example.id in self.truncation.rows:
            raise DataError(
                "chosen and rejected are identical once they are truncated, so there is nothing to "
                "learn from this row."
            )
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

    def _fitting(
        self, example: Example, prompt: list[int], response: list[int], written: list[bool]
    ) -> tuple[list[int], list[bool]]:
        """Return as much of a response as the model reads behind its prompt."""
        reason = (
            f"prompt and response have {len(prompt) + len(response):,} tokens together, the model "
            f"reads at most {self.max_tokens:,}."
        )
        room = self.max_tokens - len(prompt)
        return self.truncation.response(example.id, response, written, room, reason)

    def _checked_prompt(self, example: Example) -> list[int]:
        if not example.prompt or (isinstance(example.prompt, str) and not example.prompt.strip()):
            raise DataError("the prompt is empty.")
        ids = self._prompt_ids(example.prompt, example.extra)
        begin, is_conversation = self.tokenizer.bos_token_id, not isinstance(example.prompt, str)
        return self.truncation.prompt(
            example.id, ids, self.max_prompt_tokens, begin, is_conversation, self.prompt_limit
        )

    def _bounded(
        self,
        example: Example,
        response: list[int],
        written: list[bool],
        column: str,
        before_it: int = 0,
    ) -> tuple[list[int], list[bool]]:
        """Return as much of a response as the limit allows, of which other turns between the prompt
        and it have taken `before_it` tokens."""
        reason = (
            f"the {column} has {before_it + len(response):,} tokens, the limit is "
            f"{self.max_response_tokens:,} (data.max_response_tokens)."
        )
        room = self.max_response_tokens - before_it
        return self.truncation.response(example.id, response, written, room, reason)

    def _response(self, example: Example, answer: Text, column: str) -> list[int]:
        """Return the ids of one answer to a prompt."""
        try:
            response, written = self._turns(example, answer, column)
        except HistoryRewritten:
            written = [False]
        if not all(written):
            raise DataError(
                f"the {column} has several turns after the prompt; one answer of the assistant can "
                f"be compared."
            )
        return response

    def _turns(self, example: Example, answer: Text, column: str) -> tuple[list[int], list[bool]]:
        """Return the tokens that follow a prompt, and which of them are the assistant's. Raises
        HistoryRewritten as `render_turns` does."""
        if isinstance(answer, str):
            if not answer.strip():
                raise DataError(f"the {column} is empty, a response of zero tokens.")
            ids = response_ids(self.tokenizer, answer, self.tokenizer.eos_token_id)
            written = [True] * len(ids)
        else:
            said = [m for m in answer if m["role"] == "assistant"]
            if not any(m["content"].strip() or m.get("tool_calls") for m in said):
                raise DataError(f"the {column} is empty, a response of zero tokens.")
            assert not isinstance(example.prompt, str), "its answer would be text, too"
            try:
                _, ids, written = render_turns(
                    self.tokenizer, example.prompt, answer, example.extra
                )
            except HistoryRewritten:
                raise
            except ChatError as error:
                raise DataError(str(error)) from error
        return self._bounded(example, ids, written, column)


def texts_of(example: Example) -> Iterator[str]:
    """Yield the texts of an example."""
    for text in (example.prompt, *example.answers().values()):
        if isinstance(text, str):
            yield text
        else:
            yield from (message["content"] for message in text)


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a value of JSON: its own, or those of what it holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def ids_of(record: Prompt | Demonstration | Comparison) -> Iterator[Sequence[int]]:
    """Yield the token ids of an encoded row."""
    match record:
        case Prompt():
            yield record.ids
        case Demonstration():
            yield from (record.prompt_ids, record.response_ids)
        case Comparison():
            yield from (record.prompt_ids, record.chosen_ids, record.rejected_ids)


def first_of(refused: dict[str, str]) -> str:
    """Return the id of the first row that was refused, and the reason."""
    place, reason = next(iter(refused.items()))
    return f"{place}: {reason}"
