"""Which columns mean what: the shapes of rows that Quartet understands.

| shape | columns |
|---|---|
| prompts | `prompt`, and any others for a verifier |
| demonstrations | `prompt`, `completion`; or `messages` |
| comparisons | `prompt`, `chosen`, `rejected`; or `chosen`, `rejected` with the prompt in both |

Cells are plain text or lists of messages (`role`, `content`), as in TRL. Comparisons without a prompt column are whole
dialogues, as messages or in Anthropic's HH format (`\\n\\nHuman: … \\n\\nAssistant: …`). A shape that has more than is asked
for serves too: the chosen answer is a demonstration, and whatever has a prompt has a prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from quartet.data import DataError
from quartet.data.examples import Example, Message, Text
from quartet.data.files import Row, rows

Purpose = Literal["prompts", "demonstrations", "comparisons"]

NEEDS: dict[Purpose, tuple[str, ...]] = {
    "prompts": ("prompt",),
    "demonstrations": ("prompt", "completion"),
    "comparisons": ("prompt", "chosen", "rejected"),
}
ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"

USUAL_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context", "post"),
    "completion": ("answer", "response", "output", "text", "target"),
    "chosen": ("good", "better", "preferred", "accepted", "winner", "positive"),
    "rejected": ("bad", "worse", "dispreferred", "refused", "loser", "negative"),
}
"""Column names seen elsewhere; used to suggest a mapping, never to guess one."""


def read_examples(path: Path, purpose: Purpose, columns: Mapping[str, str]) -> list[Example]:
    """The rows of a file as examples that serve the purpose. `columns` maps our names to the file's."""
    examples: list[Example] = []
    for place, row in rows(path):
        named = {column: cell for column, cell in row.items() if column not in columns.values()}
        named |= {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        if not examples:
            _check_columns(path, purpose, row, named, columns)
        examples.append(_example(place, named, purpose))
    if not examples:
        raise DataError(f"{path}: has no rows.")
    return examples


def _check_columns(path: Path, purpose: Purpose, row: Row, named: Row, columns: Mapping[str, str]) -> None:
    missing = [f'{ours} = "{theirs}"' for ours, theirs in columns.items() if theirs not in row]
    if missing:
        raise DataError(f"{path.name}: data.columns names {missing[0]}, but the columns are {', '.join(row)}.")
    if not _serves(named, purpose):
        guess = {ours: _usual(ours, row) for ours in NEEDS[purpose] if ours not in named}
        mapping = ", ".join(f'{ours} = "{theirs}"' for ours, theirs in (dict(columns) | guess).items())
        raise DataError(
            f"{path.name}: found columns {', '.join(row) or '(none)'}. {purpose.capitalize()} need "
            f"{', '.join(NEEDS[purpose])}. Add data.columns = {{ {mapping} }}."
        )


def _serves(row: Row, purpose: Purpose) -> bool:
    pair, talk = {"chosen", "rejected"} <= row.keys(), "messages" in row
    if purpose == "comparisons":
        return pair
    if purpose == "demonstrations":
        return pair or talk or {"prompt", "completion"} <= row.keys()
    return pair or talk or "prompt" in row


def _usual(ours: str, row: Row) -> str:
    return next((c for c in row if c.lower() in USUAL_NAMES.get(ours, ())), "…")


def _example(place: str, row: Row, purpose: Purpose) -> Example:
    if not _serves(row, purpose):
        raise DataError(f"{place}: has columns {', '.join(row)}; the rows before it had {', '.join(NEEDS[purpose])}.")
    shaped = {"prompt", "completion", "chosen", "rejected", "messages"}
    extra = {column: cell for column, cell in row.items() if column not in shaped}
    if "chosen" in row and "rejected" in row:
        chosen, rejected = _text(place, "chosen", row), _text(place, "rejected", row)
        if "prompt" in row:
            prompt = _text(place, "prompt", row)
            return Example(place, prompt, chosen=_reply(prompt, chosen), rejected=_reply(prompt, rejected), extra=extra)
        prompt, chosen, rejected = split_pair(place, chosen, rejected)
        return Example(place, prompt, chosen=chosen, rejected=rejected, extra=extra)
    if "messages" in row:
        messages = _messages(place, "messages", row["messages"])
        if messages[-1]["role"] == "assistant":
            return Example(place, messages[:-1], completion=messages[-1:], extra=extra)
        if purpose == "demonstrations":
            raise DataError(f'{place}: the last message is by "{messages[-1]["role"]}"; an answer by the assistant is needed.')
        return Example(place, messages, extra=extra)
    prompt = _text(place, "prompt", row)
    if purpose == "demonstrations":
        return Example(place, prompt, completion=_reply(prompt, _text(place, "completion", row)), extra=extra)
    return Example(place, prompt, extra=extra | ({"completion": row["completion"]} if "completion" in row else {}))


def split_pair(place: str, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The prompt that two whole dialogues share, and what follows it in each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = chosen[: common_length(chosen, rejected)].rfind(ASSISTANT)
        if at < 0 or HUMAN not in chosen:
            raise DataError(
                f"{place}: chosen and rejected come without a prompt column and are no dialogues of the form "
                "“\\n\\nHuman: … \\n\\nAssistant: …” with a common beginning. Add a column prompt."
            )
        at += len(ASSISTANT)
        return chosen[:at], chosen[at:], rejected[at:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(f"{place}: one of chosen and rejected is text, the other a list of messages.")
    length = min(common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if length < 1:
        raise DataError(f"{place}: chosen and rejected have no message in common to be the prompt.")
    return chosen[:length], chosen[length:], rejected[length:]


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _reply(prompt: Text, answer: Text) -> Text:
    """An answer in the form of its prompt: text after a conversation is the assistant's message."""
    if not isinstance(prompt, str) and isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and not isinstance(answer, str):
        return answer[-1]["content"]
    return answer


def _text(place: str, column: str, row: Row) -> Text:
    cell = row[column]
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple):
        return _messages(place, column, cell)
    kind = "empty" if cell is None else f"{cell!r}"
    raise DataError(f"{place}: {column} is {kind}; it must be text or a list of messages.")


def _messages(place: str, column: str, cell: Iterable[Any]) -> Sequence[Message]:
    messages = list(cell) if isinstance(cell, list | tuple) else []
    if not messages:
        raise DataError(f"{place}: {column} must be a list of messages, and not an empty one.")
    for message in messages:
        fits = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not fits:
            raise DataError(f"{place}: {column} has a message that is not of the form {{role, content}}: {message!r}.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
