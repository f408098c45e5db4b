"""What happens to rows with more tokens than the limits allow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quartet.data import DataError

TooLongRows = Literal["refuse", "drop", "truncate_left", "truncate_right"]


class TooLong(DataError):
    """A row with more tokens than the limits allow."""


@dataclass
class Truncation:
    """Cuts what is too long, if it is to be cut, and counts the rows."""

    way: TooLongRows | None
    """None does what is done with other rows that cannot be used."""
    rows: dict[str, str] = field(default_factory=dict)
    """What was too long about each row that was cut, by the row's id."""

    @property
    def is_on(self) -> bool:
        return self.way in {"truncate_left", "truncate_right"}

    def prompt(
        self,
        row: str,
        ids: list[int],
        limit: int,
        begin: int | None,
        is_conversation: bool,
        limit_in_words: str = "",
    ) -> list[int]:
        """Return at most `limit` tokens of a prompt. Its end is kept together with the
        beginning-of-sequence token `begin` where it starts with that; or its beginning is, which
        of a conversation would lose the opening of the answer. Raises TooLong where it is not to
        be cut."""
        if len(ids) <= limit:
            return ids
        limit_in_words = limit_in_words or f"{limit:,} (data.max_prompt_tokens)"
        reason = f"the prompt has {len(ids):,} tokens, the limit is {limit_in_words}."
        if self.way == "truncate_right" and is_conversation:
            raise TooLong(
                f'{reason} Cut on the right it would lose the opening of the answer: use "'
                'truncate_left".'
            )
        self._note(row, reason)
        if self.way == "truncate_right":
            return ids[:limit]
        first = ids[:1] if ids[0] == begin else []
        return [*first, *ids[len(ids) - limit + len(first) :]]

    def response(
        self, row: str, ids: list[int], learnt: Sequence[bool], limit: int, reason: str
    ) -> tuple[list[int], list[bool]]:
        """Return the first tokens of a response, at most `limit`, and which of them are learnt; one
        that is cut has no end-of-sequence token. `reason` is the sentence on a row that is too
        long. Raises TooLong where the response is not to be cut, and DataError where nothing that
        is learnt would be left."""
        if len(ids) <= limit:
            return ids, list(learnt)
        self._note(row, reason)
        if not any(learnt[: max(limit, 0)]):
            raise DataError(f"{reason} Nothing that is learnt would be left of it.")
        return ids[:limit], list(learnt[:limit])

    def _note(self, row: str, reason: str) -> None:
        """Count a row that is cut; raise TooLong where none is."""
        if not self.is_on:
            raise TooLong(reason)
        self.rows.setdefault(row, reason)
