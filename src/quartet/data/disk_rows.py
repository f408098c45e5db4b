"""Rows in a temporary file, for data sets that are larger than memory."""

import dataclasses
import json
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

R = TypeVar("R")

IN_MEMORY_BYTES = 32 * 2**20
"""Rows that take fewer bytes than this stay in memory."""


class DiskRows(Sequence[R], Generic[R]):
    """A sequence of frozen dataclasses in a temporary file, one line of JSON for each, read one at
    a time. Memory holds only the offset of each line. The file is deleted with the object.

    Sequences are read back as tuples; cells that JSON has no form for (a date, a decimal) are read
    back as text.
    """

    def __init__(self, kind: type[R], rows: Iterable[R] = ()) -> None:
        self._kind = kind
        self._names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        self._tuples = [f.name for f in dataclasses.fields(kind) if "tuple" in str(f.type)]  # type: ignore[arg-type]
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._begins = array("Q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: R) -> None:
        """Write a row at the end of the file."""
        cells = {name: getattr(row, name) for name in self._names}
        line = json.dumps(cells, ensure_ascii=False, separators=(",", ":"), default=str).encode(
            "utf-8", "surrogatepass"
        )
        self._file.seek(self._begins[-1])
        self._file.write(line)
        self._begins.append(self._begins[-1] + len(line))

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> "Subset[R]": ...
    def __getitem__(self, index: int | slice) -> "R | Subset[R]":
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        at = range(len(self))[index]
        self._file.seek(self._begins[at])
        cells = json.loads(
            self._file.read(self._begins[at + 1] - self._begins[at]).decode(
                "utf-8", "surrogatepass"
            )
        )
        for name in self._tuples:
            if cells[name] is not None:
                cells[name] = tuple(cells[name])
        return self._kind(**cells)


@dataclasses.dataclass(frozen=True)
class Subset(Sequence[R], Generic[R]):
    """Some rows of a sequence, in any order; a row may occur several times."""

    rows: Sequence[R]
    places: Sequence[int]
    """The index in `rows` of each row of the subset."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> "Subset[R]": ...
    def __getitem__(self, index: int | slice) -> "R | Subset[R]":
        return (
            Subset(self.rows, self.places[index])
            if isinstance(index, slice)
            else self.rows[self.places[index]]
        )

    def __iter__(self) -> Iterator[R]:
        return (self.rows[place] for place in self.places)
