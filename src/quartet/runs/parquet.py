"""Reading untrusted Parquet files as tables with the columns and types that the caller expects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from quartet.runs.untrusted import Unreadable, printable, shown

Kind = Literal["text", "whole", "number", "flag"]

MAX_ROWS = 4_000_000
"""The most rows of one file: a step of a thousand responses of four thousand tokens."""
MAX_COLUMNS = 500
SEVERAL_THREADS = 100_000
"""From this number of rows on, reading with several threads is faster."""
MAX_BYTES = 1 << 30
"""The most bytes of a file's columns, uncompressed."""
MAX_TEXT_BYTES = 256 << 20
"""The most bytes of all texts of a file, each counted once per row that has it."""
MAX_STRINGS = 64 << 20
"""The most bytes of one string in a file's metadata."""
MAX_PARTS = 100_000
"""The most row groups, and entries of any list in a file's metadata."""


@dataclass(frozen=True)
class Column:
    """The expected type of a column. A file is refused where a required column is absent or has a
    null; another column that is absent or of a wrong type becomes null throughout."""

    kind: Kind
    required: bool = False


def read_parquet(
    file: IO[bytes], expected: Mapping[str, Column], names: Sequence[str] | None = None
) -> tuple[Any, list[str]]:
    """Return the file as an Arrow table, and a phrase for each column that was left out of it. The
    table has all expected columns and, of others, those of text, numbers and flags; or of all these
    only the ones called `names`. Columns of text are dictionaries. Unreadable where it is no
    Parquet, lacks a required column, or would not fit into memory."""
    import pyarrow as pa

    try:
        return _read(file, expected, names)
    except Unreadable:
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise Unreadable(
            f"is no whole Parquet file ({shown(str(error).partition('.')[0])})."
        ) from None


def _read(
    file: IO[bytes], expected: Mapping[str, Column], names: Sequence[str] | None
) -> tuple[Any, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    limits = {"thrift_string_size_limit": MAX_STRINGS, "thrift_container_size_limit": MAX_PARTS}
    with pq.ParquetFile(file, **limits) as opened:
        _refuse_large(opened.metadata)
        kinds = {field.name: _kind(field.type) for field in opened.schema_arrow}
        if len(kinds) < len(opened.schema_arrow.names):
            raise Unreadable("has two columns of one name.")
    expected = {
        name: expected[key] for name in [*expected, *kinds] if (key := _key(name, expected))
    }
    wanted = [*dict.fromkeys([*expected, *kinds])] if names is None else names
    faults = {name: fault for name in wanted if (fault := _fault(name, kinds, expected))}
    for name, fault in faults.items():
        if name in expected and expected[name].required:
            raise Unreadable(f"{fault}.")
    present = [
        name
        for name in wanted
        if kinds.get(name) is not None and (name in expected or name not in faults)
    ]
    texts = [name for name in present if kinds[name] == "text"]
    file.seek(0)
    with pq.ParquetFile(file, read_dictionary=texts, **limits) as opened:
        table = opened.read(columns=present, use_threads=opened.metadata.num_rows > SEVERAL_THREADS)
    table.validate(full=True)
    for name in present:
        if name in expected and expected[name].required and table.column(name).null_count:
            raise Unreadable(f"column {name} has empty places.")
    if sum(_text_bytes(table.column(name)) for name in texts) > MAX_TEXT_BYTES:
        raise Unreadable(f"holds more than {MAX_TEXT_BYTES >> 20} MB of text.")
    columns = {}
    for name in wanted:
        if name in present and name not in faults:
            as_float = (
                kinds[name] == "whole" and name in expected and expected[name].kind == "number"
            )
            columns[name] = (
                table.column(name).cast(pa.float64(), safe=False)
                if as_float
                else table.column(name)
            )
        elif name in expected:
            if name in present and table.column(name).null_count == table.num_rows:
                del faults[name]  # a column without a value, whatever its type
            types = {
                "text": pa.string(),
                "whole": pa.int64(),
                "number": pa.float32(),
                "flag": pa.bool_(),
            }
            columns[name] = pa.nulls(table.num_rows, types[expected[name].kind])
    return pa.table(columns), list(faults.values())


def _key(name: str, expected: Mapping[str, Column]) -> str | None:
    """Return the key of `expected` for a column: its name, or for `score/gold` the pattern
    `score/*`; None where it is not expected."""
    pattern = f"{name.partition('/')[0]}/*"
    if name.endswith("/*") or printable(name) != name:
        return None
    return name if name in expected else pattern if pattern in expected else None


def _refuse_large(metadata: Any) -> None:
    """Raise Unreadable where the metadata describes more than the limits; no column is read yet."""
    groups = [metadata.row_group(i) for i in range(min(metadata.num_row_groups, MAX_PARTS))]
    if not 0 <= metadata.num_rows <= MAX_ROWS:
        raise Unreadable(
            f"says that it has {metadata.num_rows:,} rows; {MAX_ROWS:,} is the most that is read."
        )
    if metadata.num_columns > MAX_COLUMNS:
        raise Unreadable(
            f"has {metadata.num_columns:,} columns; {MAX_COLUMNS} is the most that is read."
        )
    if (
        any(group.total_byte_size < 0 for group in groups)
        or sum(group.total_byte_size for group in groups) > MAX_BYTES
    ):
        raise Unreadable(f"holds more than {MAX_BYTES >> 30} GB.")


def _fault(
    name: str, kinds: Mapping[str, Kind | None], expected: Mapping[str, Column]
) -> str | None:
    """Return a phrase on what is wrong with a column, or None. Integers are accepted as numbers."""
    if name not in kinds:
        return f"has no column {shown(name)}"
    kind, column = kinds[name], expected.get(name)
    if column is not None and kind != column.kind and (kind, column.kind) != ("whole", "number"):
        return f"has something else than {WORDS[column.kind]} in column {shown(name)}"
    if printable(name) != name:
        return f"has a column whose name cannot be printed, {shown(name)}"
    return None if kind is not None else f"has a column of an unknown type, {shown(name)}"


WORDS = {"text": "text", "whole": "whole numbers", "number": "numbers", "flag": "true and false"}


def _kind(type_: Any) -> Kind | None:
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if pa.types.is_integer(type_):
        return "whole"
    if pa.types.is_floating(type_):
        return "number"
    return "flag" if pa.types.is_boolean(type_) else None


def _text_bytes(column: Any) -> int:
    """Return the bytes of a dictionary column's texts, each counted once per row."""
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def values(column: Any) -> list[Any]:
    """Return a column as a Python list. A dictionary column is cast first, because Arrow's own
    conversion of one is far slower."""
    import pyarrow as pa

    plain = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    result: list[Any] = plain.to_pylist()
    return result
