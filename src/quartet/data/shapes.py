"""The shapes of rows that Quartet understands, recognised by their columns.

| shape | columns |
|---|---|
| prompts | `prompt`, and any others for a reward |
| demonstrations | `prompt`, `completion` |
| demonstrations, Alpaca's | `instruction`, `output`, and `input` where there is one |
| conversations | `messages` (`role`, `content`) |
| conversations, ShareGPT's | `conversations` (`from`, `value`), and `system` where there is one |
| comparisons | `prompt`, `chosen`, `rejected` |
| comparisons, whole dialogues | `chosen`, `rejected`, with the prompt in both |
| comparisons, of `quartet label` | its lines, read by `files.rows` as comparisons |
| comparisons, OpenAI's | `input`, `preferred_output`, `non_preferred_output` |
| demonstrations, OpenRLHF's | `input`, `output` |
| comparisons, OpenRLHF's | `input`, `chosen`, `rejected` |
| texts | `text`, without a prompt |
| unpaired preferences | `prompt`, `completion`, `label` |

Cells are plain text or lists of messages, as in TRL. Comparisons without a prompt column are whole
dialogues, as messages or in Anthropic's HH format (`\\n\\nHuman: … \\n\\nAssistant: …`). A shape
that has more than is asked for serves too: the chosen answer is a demonstration, and whatever has a
prompt has a prompt. Beside messages, the columns `tools` and `chat_template_kwargs` are for the
chat template.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from quartet.data import DataError
from quartet.data.disk_rows import DiskRows
from quartet.data.examples import Example, Message, Text
from quartet.data.files import Row, rows
from quartet.data.row_shape import (
    Alpaca,
    OpenAIComparisons,
    OpenRlhf,
    PlainText,
    RowShape,
    ShareGpt,
)
from quartet.io.activity import activity, counted

Purpose = Literal["prompts", "demonstrations", "comparisons", "preferences"]
"""What rows are used for; preferences are comparisons, or unpaired."""

NEEDS: dict[Purpose, tuple[str, ...]] = {
    "prompts": ("prompt",),
    "demonstrations": ("prompt", "completion"),
    "comparisons": ("prompt", "chosen", "rejected"),
    "preferences": ("prompt", "completion", "label"),
}
OPENAI, SHAREGPT, ALPACA = OpenAIComparisons(), ShareGpt(), Alpaca()
OPENRLHF, TEXTS = OpenRlhf(), PlainText()
ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"

USUAL_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context", "post"),
    "completion": ("answer", "response", "output", "text", "target"),
    "chosen": ("good", "better", "preferred", "accepted", "winner", "positive"),
    "rejected": ("bad", "worse", "dispreferred", "refused", "loser", "negative"),
}
"""Common column names of other data sets. They suggest a mapping in an error, and are never
guessed."""


def read_examples(
    path: Path, purpose: Purpose, columns: Mapping[str, str], shape: RowShape | None = None
) -> Sequence[Example]:
    """Return the rows of a file as examples that serve the purpose. `columns` maps Quartet's names
    to the file's; `shape`, where the user names one, is applied after that. Raises `DataError`."""
    with activity(f"reading {path.name}"):
        found = counted(examples_in(path, purpose, columns, shape), lambda _: 1, 0, "rows")
        examples = DiskRows(Example, found)
    if not examples:
        raise DataError(f"{path}: has no rows.")
    return examples


def examples_in(
    path: Path, purpose: Purpose | None, columns: Mapping[str, str], shape: RowShape | None = None
) -> Iterator[Example]:
    """Yield the examples of `read_examples` one by one. Without a purpose they are prompts, or
    texts where the file has those."""
    first = True
    for place, row in rows(path):
        named = renamed(row, columns)
        if first:
            if purpose is None:
                purpose = "demonstrations" if TEXTS.fits(named) else "prompts"
            _check_columns(path, row, columns)
            if shape is None:
                _check_purpose(path, purpose, row, columns)
            else:
                _check_shape(path, purpose, named, shape)
            first = False
        ours = usual(place, named)[1] if shape is None else shape.shaped(place, named)
        assert purpose is not None, "the first row decides"
        if not _serves(ours, purpose):
            raise DataError(
                f"{place}: has columns {', '.join(ours)}; the rows before it had "
                f"{', '.join(NEEDS[purpose])}."
            )
        yield example_of(place, ours, purpose)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    named = {column: cell for column, cell in row.items() if column not in columns.values()}
    return named | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def usual(place: str, row: Row) -> tuple[str, Row]:
    """Return what rows like this one are called where they come from, and the row with Quartet's
    names for its columns."""
    keys = row.keys()
    if OPENRLHF.fits(row):
        unpaired = "unpaired preferences" if "label" in keys else "demonstrations"
        kind = "comparisons" if "chosen" in keys else unpaired
        return f"{kind}, {OPENRLHF.label}", OPENRLHF.shaped(place, row)
    if {"chosen", "rejected"} <= keys:
        return ("comparisons" if "prompt" in row else "comparisons, whole dialogues"), row
    if OPENAI.fits(row):
        return OPENAI.label, OPENAI.shaped(place, row)
    if "messages" in row:
        return "conversations", row
    if SHAREGPT.fits(row):
        return SHAREGPT.label, SHAREGPT.shaped(place, row)
    if {"prompt", "completion", "label"} <= keys:
        return "unpaired preferences", row
    if {"prompt", "completion"} <= keys:
        return "demonstrations", row
    if ALPACA.fits(row):
        return ALPACA.label, ALPACA.shaped(place, row)
    if TEXTS.fits(row):
        return TEXTS.label, TEXTS.shaped(place, row)
    return ("prompts" if "prompt" in row else ""), row


def _check_shape(path: Path, purpose: Purpose, named: Row, shape: RowShape) -> None:
    """Check the first row of a file against a shape that the user named."""
    given = f'{path.name}: data.shape = "{shape.type}"'
    if not shape.fits(named):
        needed = ", ".join(shape.columns) or "other ones"
        raise DataError(f"{given}: needs the columns {needed}; the file has {', '.join(named)}.")
    shaped = shape.shaped(path.name, named)
    if not _serves(shaped, purpose):
        needed = ", ".join(NEEDS[purpose])
        raise DataError(
            f"{given}: returns {', '.join(shaped) or 'nothing'}; {purpose} need {needed}."
        )


def _check_columns(path: Path, row: Row, columns: Mapping[str, str]) -> None:
    """Check that the columns that `data.columns` names are there."""
    missing = [f'{ours} = "{theirs}"' for ours, theirs in columns.items() if theirs not in row]
    if missing:
        raise DataError(
            f"{path.name}: data.columns names {missing[0]}, but the columns are {', '.join(row)}."
        )


def _check_purpose(path: Path, purpose: Purpose, row: Row, columns: Mapping[str, str]) -> None:
    """Check that a row has the columns that the purpose needs, or suggest how to map them."""
    named = renamed(row, columns)
    if not _serves(usual(path.name, named)[1], purpose):
        if all(_usual_name(side, row) != "…" for side in ("chosen", "rejected")):
            purpose = "comparisons"  # which serve every purpose
        guess = {ours: _usual_name(ours, row) for ours in NEEDS[purpose] if ours not in named}
        mapping = ", ".join(
            f'{ours} = "{theirs}"' for ours, theirs in (dict(columns) | guess).items()
        )
        raise DataError(
            f"{path.name}: found columns {', '.join(row) or '(none)'}. {purpose.capitalize()} need "
            f"{', '.join(NEEDS[purpose])}. Add data.columns = {{ {mapping} }}."
        )


def _serves(row: Row, purpose: Purpose) -> bool:
    pair, talk = {"chosen", "rejected"} <= row.keys(), "messages" in row
    if purpose == "comparisons":
        return pair
    if purpose == "preferences":
        return pair or {"prompt", "completion", "label"} <= row.keys()
    if purpose == "demonstrations":
        return pair or talk or {"prompt", "completion"} <= row.keys() or TEXTS.fits(row)
    return pair or talk or "prompt" in row


def _usual_name(ours: str, row: Row) -> str:
    return next((c for c in row if c.lower() in USUAL_NAMES.get(ours, ())), "…")


def example_of(place: str, row: Row, purpose: Purpose) -> Example:
    """Return the example of a row that has Quartet's column names. Raises `DataError`."""
    if not _serves(row, purpose):
        raise DataError(
            f"{place}: has columns {', '.join(row)}; {purpose} need {', '.join(NEEDS[purpose])}."
        )
    for column in MEDIA:
        if row.get(column):
            raise DataError(f"{place}: has {column}, and Quartet reads text only.")
    example = _example(place, row, purpose)
    return _with_template_columns(example) if example.conversational else example


MEDIA = ("images", "videos", "audios")
"""Columns of data sets that are of more than text."""
SHAPED = frozenset({"prompt", "completion", "chosen", "rejected", "messages"})
"""The columns that become the parts of an example; the others are its `extra`."""


def _example(place: str, row: Row, purpose: Purpose) -> Example:
    extra = {column: cell for column, cell in row.items() if column not in SHAPED}
    if "chosen" in row and "rejected" in row:
        return _comparison(place, row, extra)
    if "messages" in row:
        return _conversation(place, _messages(place, "messages", row["messages"]), purpose, extra)
    if "prompt" not in row:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"{place}: text is {text!r}; it must be text.")
        return Example(place, "", completion=text, extra=extra, is_text=True)
    prompt = _text(place, "prompt", row)
    if purpose == "preferences":
        answer = _reply(place, prompt, _text(place, "completion", row))
        if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
            raise DataError(
                f"{place}: label is {row['label']!r}; it must be true for a good completion, false "
                f"for a bad one."
            )
        chosen, rejected = (answer, None) if row["label"] else (None, answer)
        return Example(place, prompt, chosen=chosen, rejected=rejected, extra=extra)
    if purpose == "demonstrations":
        answer = _reply(place, prompt, _text(place, "completion", row))
        return Example(place, prompt, completion=answer, extra=extra)
    given = {"completion": row["completion"]} if "completion" in row else {}
    return Example(place, prompt, extra=extra | given)


def _comparison(place: str, row: Row, extra: Mapping[str, Any]) -> Example:
    """Return the example of a row with two answers."""
    chosen, rejected = _text(place, "chosen", row), _text(place, "rejected", row)
    if "prompt" not in row:
        prompt, chosen, rejected = split_pair(place, chosen, rejected)
        return Example(place, prompt, chosen=chosen, rejected=rejected, extra=extra)
    prompt = _text(place, "prompt", row)
    if isinstance(prompt, str) and _whole_dialogue(chosen) and _whole_dialogue(rejected):
        # UltraFeedback: the prompt is repeated in both dialogues.
        messages, chosen, rejected = split_pair(place, chosen, rejected)
        assert not isinstance(messages, str)
        if prompt.strip() not in {message["content"].strip() for message in messages}:
            raise DataError(
                f"{place}: prompt is no message of those that chosen and rejected have in common. "
                "Take the column prompt out, or make it messages."
            )
        return Example(place, messages, chosen=chosen, rejected=rejected, extra=extra)
    return Example(
        place,
        prompt,
        chosen=_reply(place, prompt, chosen),
        rejected=_reply(place, prompt, rejected),
        extra=extra,
    )


def _whole_dialogue(answer: Text) -> bool:
    """Return whether an answer is messages that begin with what was asked."""
    return not isinstance(answer, str) and answer[0]["role"] != "assistant"


def _with_template_columns(example: Example) -> Example:
    """Return a conversation with its tools and chat_template_kwargs in the form that a template
    reads. Tools may stand in the first message instead of a column."""
    extra, prompt = dict(example.extra), example.prompt
    if not isinstance(prompt, str) and "tools" in prompt[0]:
        first = {key: value for key, value in prompt[0].items() if key != "tools"}
        prompt = [first, *prompt[1:]]
        extra["tools"] = extra.get("tools") or example.prompt[0]["tools"]  # type: ignore[index]
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if column not in extra:
            continue
        cell = extra.pop(column)
        if isinstance(cell, str):
            try:
                cell = json.loads(cell) if cell.strip() else None
            except ValueError:
                raise DataError(f"{example.id}: {column} is text, and not JSON.") from None
        else:
            cell = without_nulls(cell)
        if cell is not None and not isinstance(cell, kind):
            expected = "a list of tools" if kind is list else "a table of the template's variables"
            raise DataError(f"{example.id}: {column} must be {expected}.")
        if cell:
            extra[column] = cell
    return replace(example, prompt=prompt, extra=extra)


def without_nulls(value: Any) -> Any:
    """Return a cell without the keys that a table format added: it gives every struct the keys of
    all rows, and null where a row did not have them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _conversation(
    place: str, messages: Sequence[Message], purpose: Purpose, extra: Mapping[str, Any]
) -> Example:
    """Return the example of a conversation. A demonstration is every turn of the assistant; a
    prompt is everything before its last turn."""
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if purpose == "demonstrations":
        if not spoken:
            raise DataError(
                f"{place}: no message is by the assistant, the last is by "
                f'"{messages[-1]["role"]}"; nothing to imitate.'
            )
        if spoken[0] == 0:
            raise DataError(
                f"{place}: the first message is the assistant's; a message of another role must "
                "come before it."
            )
        return Example(
            place,
            messages[: spoken[0]],
            completion=messages[spoken[0] : spoken[-1] + 1],
            extra=extra,
        )
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        return Example(place, messages[:-1], completion=messages[-1:], extra=extra)
    return Example(place, messages, extra=extra)


def split_pair(place: str, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Return the prompt that two whole dialogues share, and the rest of each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = chosen[: common_length(chosen, rejected)].rfind(ASSISTANT)
        if at < 0 or HUMAN not in chosen:
            raise DataError(
                f"{place}: chosen and rejected come without a prompt column and are no dialogues "
                f"of the form "
                "“\\n\\nHuman: … \\n\\nAssistant: …” with a common beginning. Add a column prompt."
            )
        at += len(ASSISTANT)
        return chosen[:at], chosen[at:], rejected[at:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(
            f"{place}: one of chosen and rejected is text, the other a list of messages."
        )
    length = min(common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if length < 1:
        raise DataError(f"{place}: chosen and rejected have no message in common to be the prompt.")
    return chosen[:length], chosen[length:], rejected[length:]


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common beginning of two sequences."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _reply(place: str, prompt: Text, answer: Text) -> Text:
    """Return an answer in the form of its prompt: text after a conversation becomes a message of
    the assistant."""
    if not isinstance(prompt, str) and isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(answer, str):
        return answer
    if answer[-1]["role"] != "assistant":
        raise DataError(
            f'{place}: the last message of an answer is by "{answer[-1]["role"]}"; it must be the '
            f"assistant's."
        )
    if isinstance(prompt, str):
        if len(answer) > 1:
            raise DataError(
                f"{place}: the prompt is text and the answer has {len(answer)} messages; give the "
                f"prompt messages too."
            )
        return str(answer[0]["content"])
    return answer


def _text(place: str, column: str, row: Row) -> Text:
    cell = row[column]
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple):
        return _messages(place, column, cell)
    kind = "empty" if cell is None else f"{cell!r}"
    raise DataError(f"{place}: {column} is {kind}; it must be text or a list of messages.")


def _messages(place: str, column: str, cell: Any) -> Sequence[Message]:
    rows = list(cell) if isinstance(cell, list | tuple) else []
    if not rows:
        raise DataError(f"{place}: {column} must be a list of messages, and not an empty one.")
    messages = []
    for row in rows:
        calls = isinstance(row, dict) and bool(row.get("tool_calls"))
        fits = isinstance(row, dict) and isinstance(row.get("role"), str)
        content = _joined(place, column, row.get("content")) if fits else None
        if not fits or not (isinstance(content, str) or (calls and content is None)):
            raise DataError(
                f"{place}: {column} has a message that is not of the form {{role, content}}: "
                f"{row!r}."
            )
        message = {"content": "", **without_nulls(row | {"content": content})}
        if not calls:  # some formats write an empty list, and some templates refuse it
            message.pop("tool_calls", None)
        messages.append(message)
    return messages


def _joined(place: str, column: str, content: Any) -> Any:
    """Return the text of a content that is a list of parts; any other content as it is."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            named = f"of type {kind}" if isinstance(kind, str) else f"{part!r}"
            raise DataError(
                f"{place}: {column} has a part {named} in a message, and Quartet reads text only."
            )
        texts.append(text)
    return "".join(texts)
