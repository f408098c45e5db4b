"""Shapes of rows that have other column names than Quartet's: each is a function from a row to a
row with Quartet's."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from quartet.data import DataError
from quartet.data.files import Row
from quartet.parts import Family

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's names of the speakers, where they differ from the chat roles."""


class RowShape(Family):
    """How the columns of a file become `prompt`, `completion`, `chosen`, `rejected`, `label` or
    `messages`. Columns of any other name are kept for the rewards.

    A subclass implements `__call__` and names the columns that it needs. Quartet's own are
    recognised by their columns; a user's is named in `data.shape`.
    """

    accepts_name: ClassVar[bool] = True
    label: ClassVar[str] = ""
    """What `quartet data` calls rows of this shape."""
    columns: ClassVar[tuple[str, ...]] = ()
    """The columns that a row must have."""

    def fits(self, row: Row) -> bool:
        """Return whether a row has this shape."""
        return set(self.columns) <= row.keys()

    def __call__(self, row: Row) -> Mapping[str, Any]:
        """Return the row with Quartet's names for its columns. Raises `ValueError`, with what is
        wrong with the row, where it cannot be used."""
        raise NotImplementedError

    def shaped(self, place: str, row: Row) -> Row:
        """Return what calling the shape returns, as a dict; `place` is the row's file and line.
        Raises `DataError` where the call fails or returns something else."""
        try:
            shaped = self(row)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        except Exception as error:
            raise DataError(f'{place}: data.shape = "{self.type}" failed: {error!r}.') from error
        if not isinstance(shaped, Mapping):
            kind = type(shaped).__name__
            raise DataError(
                f'{place}: data.shape = "{self.type}" returned a {kind}; it must be a dict.'
            )
        return dict(shaped)


class OpenAIComparisons(RowShape):
    """Comparisons as OpenAI's fine-tuning takes them."""

    type: Literal["openai"] = "openai"
    label: ClassVar[str] = "comparisons, OpenAI's"
    columns: ClassVar[tuple[str, ...]] = ("input", "preferred_output", "non_preferred_output")

    def __call__(self, row: Row) -> Row:
        asked = row["input"]
        tools = {"tools": asked["tools"]} if isinstance(asked, dict) and asked.get("tools") else {}
        return (
            without(row, *self.columns)
            | tools
            | {
                "prompt": asked.get("messages") if isinstance(asked, dict) else asked,
                "chosen": row["preferred_output"],
                "rejected": row["non_preferred_output"],
            }
        )


class ShareGpt(RowShape):
    """Conversations with `from` and `value` in place of `role` and `content`."""

    type: Literal["sharegpt"] = "sharegpt"
    label: ClassVar[str] = "conversations, ShareGPT's"
    columns: ClassVar[tuple[str, ...]] = ("conversations",)

    def __call__(self, row: Row) -> Row:
        turns, system = row["conversations"], row.get("system")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("conversations must be a list of turns with from and value.")
        messages = [{"role": "system", "content": system}] if isinstance(system, str) else []
        messages = [message for message in messages if message["content"]]
        for turn in turns:
            speaker = turn.get("from", turn.get("role"))
            content = turn.get("value", turn.get("content"))
            messages.append({"role": ROLES.get(speaker, speaker), "content": content})
        return without(row, "conversations") | {"messages": messages}


class Alpaca(RowShape):
    """Demonstrations with an instruction, an optional input and an output."""

    type: Literal["alpaca"] = "alpaca"
    label: ClassVar[str] = "demonstrations, Alpaca's"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "output")

    def fits(self, row: Row) -> bool:
        return super().fits(row) and "prompt" not in row

    def __call__(self, row: Row) -> Row:
        asked = [text for text in (row["instruction"], row.get("input")) if text]
        all_text = all(isinstance(text, str) for text in asked)
        prompt = "\n\n".join(asked) if all_text else row["instruction"]
        return without(row, "instruction", "input", "output") | {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": row["output"],
        }


class OpenRlhf(RowShape):
    """A prompt called `input`, with an `output`, or with `chosen` and `rejected`."""

    type: Literal["openrlhf"] = "openrlhf"
    label: ClassVar[str] = "OpenRLHF's"
    columns: ClassVar[tuple[str, ...]] = ("input",)

    def fits(self, row: Row) -> bool:
        has_answer = "output" in row or {"chosen", "rejected"} <= row.keys()
        return super().fits(row) and has_answer and row.keys().isdisjoint(("prompt", "instruction"))

    def __call__(self, row: Row) -> Row:
        answer = {"completion": row["output"]} if "output" in row else {}
        return without(row, "input", "output") | {"prompt": row["input"]} | answer


class PlainText(RowShape):
    """Texts without a prompt, all of which is learnt."""

    type: Literal["text"] = "text"
    label: ClassVar[str] = "texts"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    def fits(self, row: Row) -> bool:
        """Return whether `text` is a row's only column that could be learnt from or asked for."""
        return super().fits(row) and row.keys().isdisjoint(PROMPT_NAMES)

    def __call__(self, row: Row) -> Row:
        return row


PROMPT_NAMES = (
    *("prompt", "question", "instruction", "query", "input", "context", "post"),
    *("messages", "conversations", "completion", "chosen", "rejected"),
)
"""Columns beside which a column `text` is not the whole of a row."""


def without(row: Row, *columns: str) -> Row:
    """Return the row without these columns."""
    return {column: cell for column, cell in row.items() if column not in columns}


__all__ = ["Alpaca", "OpenAIComparisons", "OpenRlhf", "PlainText", "RowShape", "ShareGpt"]
