"""Rows of files: .jsonl, .jsonl.gz, .csv and .parquet, read one by one, each with its place."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.data import DataError

Row = dict[str, Any]


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file and where each stands, such as `prefs.jsonl:12`. Lines count from 1; in a parquet file, rows do."""
    name = path.name.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file.")
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Name a .jsonl, .jsonl.gz, .csv or .parquet file in it.")
    try:
        if name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
            yield from _jsonl(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise DataError(f"{path}: not a format that is read here. Use .jsonl, .jsonl.gz, .csv or .parquet.")
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    good = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path.name}:{number}"
                try:
                    row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8 text (byte {error.start} of the line). {_fine(good)}") from None
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: not JSON ({_reason(error)}). {_fine(good)}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{place}: is {_kind(row)}, not an object with named columns. {_fine(good)}")
                good += 1
                yield place, row
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise DataError(f"{path.name}: the compressed file is damaged ({error}). {_fine(good)}") from None


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text (byte {error.start}).") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    good = 0
    try:
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{place}: has another number of cells than the {len(reader.fieldnames or [])} columns of the header. "
                    + _fine(good)
                )
            good += 1
            yield place, dict(row)
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.line_num}: not CSV ({error}). {_fine(good)}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name}: not a parquet file ({str(error).partition('.')[0]}).") from None
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path.name}:{number}", row


def _fine(good: int) -> str:
    if good == 0:
        return "It is the first row."
    return "The row before it is fine." if good == 1 else f"{good:,} rows before it are fine."


def _reason(error: json.JSONDecodeError) -> str:
    if error.msg.startswith("Unterminated string"):
        return "line ends inside a string"
    what = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return f"{what} at character {error.colno}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
