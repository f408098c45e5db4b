"""Pairs to be labelled, from a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.data import DataError
from quartet.data.files import Row, rows
from quartet.data.shapes import example_of, usual
from quartet.labels.pairs import Pair, all_pairs, distinct


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a file's rows, without those whose answers are equal. A row has a prompt
    with `answer_a` and `answer_b`, or with a list of `answers`, each two of which are a pair; or it
    is a comparison of any shape that is known. Raises `DataError`."""
    pairs = distinct(pair for place, row in rows(path) for pair in _pairs_of(place, row))
    if not pairs:
        raise DataError(f"{path}: has no pair of two different answers.")
    return pairs


def _pairs_of(place: str, row: Row) -> Iterator[Pair]:
    if {"prompt", "answer_a", "answer_b"} <= row.keys():
        source, deviation = row.get("source"), row.get("uncertainty")
        yield Pair(
            _text(place, "prompt", row["prompt"]),
            _text(place, "answer_a", row["answer_a"]),
            _text(place, "answer_b", row["answer_b"]),
            source if isinstance(source, str) and source else place,
            deviation if isinstance(deviation, float) else None,
        )
        return
    if {"prompt", "answers"} <= row.keys():
        answers = row["answers"]
        if not isinstance(answers, list) or len(answers) < 2:
            raise DataError(f"{place}: answers must be a list of two answers or more.")
        texts = [_text(place, "answers", answer) for answer in answers]
        yield from all_pairs(_text(place, "prompt", row["prompt"]), texts, place)
        return
    _, named = usual(place, row)
    if not {"chosen", "rejected"} <= named.keys():
        raise DataError(
            f"{place}: has columns {', '.join(row)}. Pairs need prompt with answer_a and answer_b, "
            "with a list of answers, or with chosen and rejected."
        )
    example = example_of(place, named, "comparisons")
    assert example.chosen is not None and example.rejected is not None
    yield Pair(example.prompt, example.chosen, example.rejected, place)


def _text(place: str, column: str, cell: Any) -> Any:
    messages = (
        isinstance(cell, list)
        and cell
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in cell)
    )
    if isinstance(cell, str) or messages:
        return cell
    raise DataError(f"{place}: {column} is {cell!r}; it must be text or a list of messages.")
