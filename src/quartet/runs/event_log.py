"""Reading events.jsonl while it grows: the metrics of each stage as columns, and other events."""

import math
import os
from array import array
from collections.abc import Iterator, Mapping
from typing import IO, Any

from quartet.runs import records
from quartet.runs.untrusted import Folder, Unreadable, shown

MAX_BYTES = 1 << 30
MAX_LINES = 2_000_000
MAX_NUMBERS = 50_000_000
"""The most bytes, lines and numbers of events.jsonl that are read."""
MAX_FAULTS = 1_000_000
"""After so many damaged lines and entries, the rest of the file is not read."""
MAX_EVENTS = 100_000
"""The most events other than metrics that are kept."""
MAX_STAGES = 64
MAX_METRICS = 2_000
"""The most metrics of one stage."""
IDENTITY = frozenset({"stage", "step", "time", "seconds"})
"""Columns of the metrics table that identify a step; no metric may have such a name."""


class Series:
    """The metrics of one stage, by name; NaN where a step has none."""

    def __init__(self) -> None:
        self.steps: array[int] = array("q")
        self.times: array[float] = array("d")
        self.seconds: array[float] = array("d")
        self.phases: dict[str, array[float]] = {}
        self.columns: dict[str, array[float]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        count, step = len(self.steps), event["step"]
        self.times.append(event["time"])
        self.seconds.append(event.get("seconds", math.nan))
        for columns, values in (
            (self.columns, event["metrics"]),
            (self.phases, event.get("phases") or {}),
        ):
            for name in values.keys() - columns.keys():
                columns[name] = array("d", [math.nan]) * count
            for name, column in columns.items():
                value = values.get(name)
                column.append(math.nan if value is None else value)
        self.steps.append(step)

    def last(self, name: str, count: int = 1) -> float | None:
        """Return the mean of the last `count` values that are numbers; None where there are
        none."""
        numbers = [x for x in self.columns.get(name, ())[-count:] if not math.isnan(x)]
        return sum(numbers) / len(numbers) if numbers else None


class EventLog:
    """The part of events.jsonl that has been read so far."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, Series] = {}
        self.events: list[dict[str, Any]] = []
        self.damaged = self.incomplete = 0
        """Counts of lines that are no events, and of entries in other lines that have a wrong
        type."""
        self._first_damaged = self._first_incomplete = ""
        self._inode = self._read_to = self._lines = self._numbers = 0
        self._in_long_line = False

    def refresh(self) -> bool | None:
        """Read what was appended since the last call. Return whether there was anything, or None
        where there is no file. A last line without its end is read next time."""
        file = self.folder.open(self.name)
        if file is None:
            return None
        with file:
            facts = os.fstat(file.fileno())
            if (
                facts.st_size < self._read_to or facts.st_ino != self._inode
            ):  # cut back to a checkpoint, or another file
                self._forget()
            self._inode = facts.st_ino
            begin = self._read_to
            try:
                self._read_on(file)
            except OSError as error:
                raise Unreadable(f"cannot be read ({error.strerror}).") from None
        return self._read_to > begin

    @property
    def full(self) -> bool:
        """Whether a limit was reached, so that no more of the file is read."""
        much = (
            self._read_to >= MAX_BYTES or self._lines >= MAX_LINES or self._numbers >= MAX_NUMBERS
        )
        return much or self.damaged + self.incomplete >= MAX_FAULTS

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each kind of thing that was left out."""
        if self.damaged:
            count = "1 line was" if self.damaged == 1 else f"{self.damaged:,} lines were"
            first = "the first, " if self.damaged > 1 else ""
            yield f"{self.name}: {count} left out: {first}{self._first_damaged}."
        if self.incomplete:
            more = f" ({self.incomplete - 1:,} more)" if self.incomplete > 1 else ""
            yield f"{self.name}: {self._first_incomplete}; it is left out{more}."
        if self.full:
            part = f"its first {self._lines:,} lines ({self._read_to / 1e6:,.0f} MB)"
            yield f"{self.name} is too long: only {part} were read."

    def _read_on(self, file: IO[bytes]) -> None:
        file.seek(self._read_to)
        while not self.full:
            line = file.readline(records.MAX_LINE + 1)
            whole = line.endswith(b"\n")
            if not line or not (whole or self._in_long_line or len(line) > records.MAX_LINE):
                break
            self._read_to += len(line)
            if not self._in_long_line:
                self._lines += 1
                if whole:
                    self._see(line)
                else:
                    self._leave_out(f"is longer than {records.MAX_LINE >> 20} MB")
            self._in_long_line = not whole

    def _see(self, line: bytes) -> None:
        try:
            event, faults = records.parse_event(line)
        except (
            Unreadable
        ) as error:  # such as one that was torn by a crash, and written on behind it
            self._leave_out(str(error).rstrip("."))
            return
        kind, stage = event["event"], event.get("stage")
        if kind in {"metrics", "started"} and stage not in self.series:
            if len(self.series) == MAX_STAGES:
                self._leave_out(f"is of stage {MAX_STAGES + 1}")
                return
            self.series[str(stage)] = Series()
        if kind == "metrics":
            series = self.series[str(stage)]
            faults += [
                *_too_many(event["metrics"], series.columns),
                *_too_many(event.get("phases") or {}, series.phases),
            ]
            series.add(event)
            self._numbers += len(series.columns) + len(series.phases)
        elif len(self.events) < MAX_EVENTS or kind in {"done", "failed", "interrupted"}:
            self.events.append(event)
        else:
            self._leave_out(f"comes after {MAX_EVENTS:,} events")
        if faults:
            self._first_incomplete = (
                self._first_incomplete or f"in line {self._lines:,}, {faults[0]}"
            )
            self.incomplete += len(faults)

    def _leave_out(self, why: str) -> None:
        self.damaged += 1
        self._first_damaged = self._first_damaged or f"line {self._lines:,} {why}"


def _too_many(table: dict[str, Any], columns: Mapping[str, Any]) -> Iterator[str]:
    """Remove metrics beyond MAX_METRICS, or with a forbidden name, and yield a phrase for each."""
    room = MAX_METRICS - len(columns)
    for name in [name for name in table if name not in columns]:
        if name in IDENTITY or room <= 0:
            del table[name]
            yield (
                f"{shown(name)} cannot be a metric's name"
                if name in IDENTITY
                else f"{shown(name)} is one metric too many"
            )
        room -= 1
