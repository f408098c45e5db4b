"""The file of labels: one line of JSON for each label and each undo, only ever appended to.

A line is on the disk before anyone is told that a label was taken. A process that is killed while
it writes leaves at most a torn last line, whose label was never confirmed; the next one that opens
the file ends that line and writes behind it that it is torn.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from quartet import files
from quartet.errors import QuartetError
from quartet.labels.pairs import Pair

Verdict = Literal["a", "b", "tie", "both_bad", "skip"]
"""Which answer is better, in the pair's own order; the others prefer none."""
Order = Literal["ab", "ba"]
"""The order in which the answers were shown."""
VERDICTS: tuple[str, ...] = get_args(Verdict)
LEFT_OUT = {"tie": "ties", "both_bad": "both bad", "skip": "skipped"}
"""The verdicts that give no comparison, and what they are called in a sentence."""
EVENTS = {"label": ("verdict", str), "undo": ("label", str), "torn": ("line", int)}
"""The events of lines, each with a key that its line has, and the type of its value."""
FIRST_LINES = 10
"""How many lines are looked at to recognise a file of labels."""


class LabelError(QuartetError, ValueError):
    """A file of labels cannot be read or written."""


def now() -> str:
    """Return the time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Label:
    """One verdict about a pair."""

    id: str
    labeller: str
    pair: Pair
    verdict: Verdict
    order: Order
    repeat: bool = False
    """Whether the labeller was shown a pair again that they had labelled before."""
    comment: str = ""
    tab: str = ""
    """The browser's tab that it came from."""
    time: str = ""
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What a judge records of itself: its model, its prompt, its tokens."""

    def row(self) -> dict[str, Any]:
        """Return the label's line. With a preferred answer it is a comparison."""
        pair = self.pair
        a, b = pair.answer_a, pair.answer_b
        sides = {"a": (a, b), "b": (b, a)}.get(self.verdict)
        return {
            "event": "label",
            "id": self.id,
            "pair": pair.id,
            "labeller": self.labeller,
            "verdict": self.verdict,
            "order": self.order,
            "repeat": self.repeat,
            "comment": self.comment,
            "tab": self.tab,
            "time": self.time or now(),
            "source": pair.source,
            "uncertainty": pair.uncertainty,
            "prompt": pair.prompt,
            "answer_a": a,
            "answer_b": b,
            **({} if sides is None else {"chosen": sides[0], "rejected": sides[1]}),
            **self.extra,
        }


KEYS = frozenset(Label("", "", Pair("", "", ""), "a", "ab").row())
"""The keys of a label's line; a judge's has more."""


@dataclass(frozen=True)
class Labels:
    """The contents of a file of labels."""

    labels: Sequence[tuple[int, Label]]
    """Those that were not undone, each with the number of its line, from 1."""
    undone: tuple[Label, ...] = ()
    torn: tuple[int, ...] = ()
    """The numbers of lines that a killed process left unfinished."""

    def comparisons(self) -> list[tuple[int, Label]]:
        """Return the labels that prefer an answer, without the repeated ones, which measure the
        labeller. Labels of one pair stand together, so that a split in two divides one pair at
        most."""
        by_pair: dict[str, list[tuple[int, Label]]] = {}
        for number, label in self.labels:
            if label.verdict not in LEFT_OUT and not label.repeat:
                by_pair.setdefault(label.pair.id, []).append((number, label))
        return [entry for entries in by_pair.values() for entry in entries]

    def sentence(self) -> str:
        """Return how many comparisons the labels are and what is left out."""
        count = len(self.comparisons())
        kinds = Counter(
            "repeated" if label.repeat else LEFT_OUT.get(label.verdict, "")
            for _, label in self.labels
        )
        names = [*LEFT_OUT.values(), "repeated"]
        out = [f"{kinds[name]} {name}" for name in names if kinds[name]]
        out += [f"{len(self.undone)} undone"] * bool(self.undone)
        out += [f"line {number} torn by a kill" for number in self.torn]
        words = f"{count:,} comparison{'s' * (count != 1)}"
        return words + (f"; left out: {', '.join(out)}" if out else "")


def is_label_row(row: Any) -> bool:
    """Return whether a row is a line of a file of labels."""
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return False
    key, kind = EVENTS.get(row["event"], ("", str))
    return isinstance(row.get(key), kind)


def is_label_file(path: Path) -> bool:
    """Return whether the first line of a file that is JSON is that of a file of labels. A kill
    during the first label tears the line before it."""
    try:
        with path.open("rb") as file:
            for line in itertools.islice(file, FIRST_LINES):
                with contextlib.suppress(ValueError, RecursionError):
                    return is_label_row(json.loads(line))
    except OSError:
        pass
    return False


def read_labels(path: Path) -> Labels:
    """Return the labels of a file; none where there is no such file. Raises `LabelError` for a
    line that is damaged otherwise than by a kill."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Labels(())
    except OSError as error:
        raise LabelError(f"{path}: cannot be read ({error.strerror}).") from error
    return labels_in(content, path)


def labels_in(content: bytes, path: Path) -> Labels:
    """Return the labels of the content of a file; `path` is what an error calls it."""
    lines = content.split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows[number] = json.loads(line)
        except (ValueError, RecursionError):
            unreadable.append(number)
    said = {row["line"] for row in rows.values() if is_label_row(row) and row["event"] == "torn"}
    unfinished = len(lines) if lines[-1].strip() else None
    for number in unreadable:
        if number not in said and number != unfinished:
            raise LabelError(
                f"{path.name}:{number}: not JSON, and not the end of the file, where a kill could "
                "have torn it. Take the line out."
            )
    return _labels(path, rows, tuple(unreadable))


def _labels(path: Path, rows: Mapping[int, dict[str, Any]], torn: tuple[int, ...]) -> Labels:
    labels: dict[str, tuple[int, Label]] = {}
    undone: list[Label] = []
    for number, row in rows.items():
        if not is_label_row(row):
            raise LabelError(
                f"{path.name}:{number}: is no label; the lines of this file have event = "
                '"label" or "undo".'
            )
        if row["event"] == "undo":
            if row["label"] in labels:
                undone.append(labels.pop(row["label"])[1])
        elif row["event"] == "label":
            label = _label(f"{path.name}:{number}", row)
            labels.setdefault(label.id, (number, label))
    return Labels(tuple(labels.values()), tuple(undone), torn)


def _label(place: str, row: Mapping[str, Any]) -> Label:
    needed = ("id", "labeller", "verdict", "order", "prompt", "answer_a", "answer_b")
    if missing := [key for key in needed if key not in row]:
        raise LabelError(f"{place}: has no {missing[0]}, which each label needs.")
    if not isinstance(row["id"], str) or not isinstance(row["labeller"], str):
        raise LabelError(f"{place}: id and labeller must be texts.")
    if row["verdict"] not in VERDICTS:
        raise LabelError(
            f"{place}: verdict is {row['verdict']!r}; it must be one of {', '.join(VERDICTS)}."
        )
    pair = Pair(
        row["prompt"],
        row["answer_a"],
        row["answer_b"],
        row.get("source", ""),
        row.get("uncertainty"),
    )
    return Label(
        row["id"],
        row["labeller"],
        pair,
        row["verdict"],
        row["order"],
        bool(row.get("repeat")),
        row.get("comment", ""),
        row.get("tab", ""),
        row.get("time", ""),
        {key: cell for key, cell in row.items() if key not in KEYS},
    )


class LabelLog:
    """A file of labels that is open for writing, by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises `LabelError` where the file cannot be written or another process writes it."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise LabelError(f"{path}: cannot be written ({error.strerror}).") from error
        if not files.try_lock(self._file):
            os.close(self._file)
            raise LabelError(
                f"{path}: another process writes these labels. Use the page that it serves, or "
                "another file with --output."
            )
        files.sync(path.parent)
        try:
            self.labels = read_labels(path)
            self._end_last_line()
        except LabelError:
            self.close()
            raise

    def _end_last_line(self) -> None:
        content = self.path.read_bytes()
        if not content or content.endswith(b"\n"):
            return
        number = content.count(b"\n") + 1
        if number in self.labels.torn:
            row = {"event": "torn", "line": number, "time": now()}
            # One write: an ended line that nothing says is torn could never be read again.
            self._write(b"\n" + json.dumps(row).encode() + b"\n")
        else:
            self._write(b"\n")

    def add(self, label: Label) -> None:
        """Append a label. It is on the disk when this returns."""
        self._append(label.row())

    def undo(self, label: Label) -> None:
        """Append that a label no longer counts."""
        self._append(
            {"event": "undo", "label": label.id, "labeller": label.labeller, "time": now()}
        )

    def _append(self, row: Mapping[str, Any]) -> None:
        self._write(json.dumps(row).encode() + b"\n")

    def _write(self, content: bytes) -> None:
        """Append bytes, all or none."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, content) < len(content):
                raise OSError(28, "no space left on the device")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise LabelError(
                f"{self.path}: the label could not be written ({error.strerror})."
            ) from error

    def close(self) -> None:
        """Close the file, so that another process can write it."""
        os.close(self._file)
