"""Rows of files (.jsonl, .jsonl.gz, .json, .csv, .parquet), folders of them, or data sets of the
hub: one by one, each with its place."""

import contextlib
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub_constants

from quartet import files
from quartet.data import DataError
from quartet.io.install import install_command
from quartet.io.texts import nearest, not_utf8, well_formed_json
from quartet.labels.log import LabelError, is_label_file, read_labels
from quartet.models.hub import why_not_on_hub

Row = dict[str, Any]
FORMATS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".parquet")
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>.+))?")
"""How a data set of the hub is named: owner/name, perhaps with a configuration behind a slash and a
split behind a colon."""


def check_there(path: Path) -> None:
    """Raise `DataError` where there is no such file or folder, and the name is none of the hub's or
    of a folder that `datasets` saved."""
    if files.exists(path) or is_saved(Path(str(path).partition(":")[0])):
        return
    if not path.name.lower().endswith(FORMATS) and HUB.fullmatch(str(path)):
        return
    raise DataError(f"{path}: no such file.{_nearest_file(path)}")


def _nearest_file(path: Path) -> str:
    """Return " Did you mean X?" with the data file beside a path whose name is most like it, the
    ending left out, which most have in common; "" if none is."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    stems = {file.stem: file.name for file in beside if file.name.lower().endswith(FORMATS)}
    near = nearest(path.stem, stems)
    return "" if near is None else f" Did you mean {stems[near]}?"


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place, such as `prefs.jsonl:12`. Lines count from 1;
    in a parquet file, rows do."""
    name = path.name.lower()
    saved, _, split = str(path).partition(":")
    if is_saved(Path(saved)):
        yield from _saved(Path(saved), split)
        return
    if not files.exists(path):
        check_there(path)
        hub = HUB.fullmatch(str(path))
        assert hub is not None, "what is not here is on the hub"
        yield from _hub(path, hub)
        return
    if path.is_dir():
        for file in files_in(path):
            yield from rows(file)
        return
    try:
        if is_label_file(path):
            yield from _labelled(path)
        elif name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
            yield from _jsonl(path)
        elif name.endswith(".json"):
            yield from _json(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise DataError(
                f"{path}: not a format that is read here. Use .jsonl, .jsonl.gz, .json, .csv or "
                f".parquet."
            )
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _labelled(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the comparisons of a file of labels: those of `quartet label` that prefer an answer and
    were not undone."""
    try:
        labels = read_labels(path)
    except LabelError as error:
        raise DataError(str(error)) from error
    comparisons = labels.comparisons()
    if not comparisons:
        raise DataError(f"{path.name}: no label prefers an answer ({labels.sentence()}).")
    for number, label in comparisons:
        row = label.row()
        yield f"{path.name}:{number}", {key: row[key] for key in ("prompt", "chosen", "rejected")}


def label_notes(path: Path) -> list[str]:
    """Return a sentence for each file of labels that a path names: how many comparisons it has and
    what is left out."""
    label_files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    return [
        f"{file.name}: {read_labels(file).sentence()}."
        for file in label_files
        if is_label_file(file)
    ]


def files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder and its subfolders, sorted by name."""
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.lower().endswith(FORMATS) and file.is_file()
    ]
    if not found:
        raise DataError(
            f"{folder}: is a folder without .jsonl, .jsonl.gz, .json, .csv or .parquet files."
        )
    return found


def is_saved(folder: Path) -> bool:
    """Return whether the package datasets wrote this folder."""
    return any(files.exists(folder / f"dataset_{name}.json") for name in ("dict", "info"))


def _saved(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a folder of the package datasets, which is memory-mapped."""
    table = _datasets(folder).load_from_disk(str(folder))
    if isinstance(table, dict):
        if split not in table:
            which = f"has no split {split}" if split else "has several splits"
            raise DataError(
                f"{folder}: {which}. Write one of "
                f"{', '.join(f'{folder}:{name}' for name in table)}."
            )
        table = table[split]
    for number, row in enumerate(table, 1):
        yield f"{folder.name}:{number}", row


def _hub(path: Path, name: "re.Match[str]") -> Iterator[tuple[str, Row]]:
    """Yield the rows of a data set of the hub, downloaded once to the cache of the package."""
    datasets = _datasets(path)
    why = why_not_on_hub(name["id"], "dataset")
    try:
        with _offline(datasets) if why else contextlib.nullcontext():
            table = datasets.load_dataset(
                name["id"], name["config"], split=name["split"] or "train"
            )
    except Exception as error:  # whatever a hub, a network or a cache may say
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{path}: is no file or folder here, and {why or f'the hub gives no data ({reason}).'}"
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{path}:{number}", row


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Within this context, data sets come from the cache only: what the hub did not give once would
    be asked for again for half a minute."""
    places: tuple[Any, ...] = (datasets.config, hub_constants)
    before = hub_constants.HF_HUB_OFFLINE
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place in places:
            place.HF_HUB_OFFLINE = before


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path}: no such file. Data sets of the hub and folders of the package datasets need "
            f"{install_command('datasets')}."
        ) from None
    datasets.disable_progress_bars()
    return datasets


class _Repeated(DataError):
    """A JSON object that has a name more than once, of which Python would keep the last."""


def _parsed(text: str) -> Any:
    """Return the value of a JSON text. Half a surrogate pair, which no tokenizer reads and no file
    holds, is spelled as its escape."""
    value = json.loads(text, object_pairs_hook=_object)
    return well_formed_json(value) if "\\u" in text else value


def _object(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Repeated(repr(_repeated([name for name, _ in pairs])))
    return made


def _repeated(names: Sequence[str]) -> str | None:
    """Return the first of some names that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a JSON list. The file is read whole, for JSON has no lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = _parsed(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: {not_utf8(error, f'byte {error.start}')}") from None
    except json.JSONDecodeError as error:
        extra = " Is it JSON lines? Call it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"{path.name}:{error.lineno}: not JSON ({error.msg[0].lower() + error.msg[1:]}).{extra}"
        ) from None
    except _Repeated as error:
        raise DataError(f"{path.name}: a row has {error} twice. Keep one.") from None
    except (RecursionError, ValueError):
        raise DataError(
            f"{path.name}: JSON that cannot be read: too deep, or a number too long."
        ) from None
    if not isinstance(table, list):
        raise DataError(f"{path.name}: is {_kind(table)}, not a list of rows.")
    for number, row in enumerate(table, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path.name}:{number}: is {_kind(row)}, not an object with named columns. "
                f"{_fine(number - 1)}"
            )
        yield f"{path.name}:{number}", row


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    good = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path.name}:{number}"
                try:
                    row = _parsed(
                        line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
                    )
                except UnicodeDecodeError as error:
                    where = f"byte {error.start} of the line"
                    raise DataError(f"{place}: {not_utf8(error, where)} {_fine(good)}") from None
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{place}: not JSON ({_reason(error)}). {_fine(good)}"
                    ) from None
                except _Repeated as error:
                    raise DataError(f"{place}: has {error} twice. Keep one.") from None
                except (
                    RecursionError,
                    ValueError,
                ):  # brackets without end, numbers of thousands of digits
                    raise DataError(
                        f"{place}: JSON that cannot be read: too deep, or a number too long. "
                        f"{_fine(good)}"
                    ) from None
                if not isinstance(row, dict):
                    whole = isinstance(row, list) and not good
                    advice = "Is it one JSON list? Call it .json." if whole else _fine(good)
                    raise DataError(
                        f"{place}: is {_kind(row)}, not an object with named columns. {advice}"
                    )
                good += 1
                yield place, row
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(
                f"{path.name}: the compressed file is damaged ({error})."
                + (f" {_fine(good)}" if good else "")
            ) from None


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    good = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _csv_rows(path, csv.DictReader(file, strict=True), good)


def _csv_rows(path: Path, reader: "csv.DictReader[str]", good: int) -> Iterator[tuple[str, Row]]:
    try:
        _check_header(path, reader.fieldnames or [])
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{place}: has another number of cells than the {len(reader.fieldnames or [])} "
                    f"columns of the header. " + _fine(good)
                )
            good += 1
            yield place, dict(row)
    except UnicodeDecodeError as error:
        where = f"after line {reader.line_num}" if reader.line_num else error.reason
        raise DataError(f"{path.name}: {not_utf8(error, where)}") from None
    except csv.Error as error:
        raise DataError(
            f"{path.name}:{reader.line_num}: not CSV ({error}). {_fine(good)}"
        ) from None


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raise `DataError` where two columns have one name, or the one column of a header is several,
    with another separator."""
    if (name := _repeated(names)) is not None:
        raise DataError(f"{path.name}:1: two columns are called {name!r}. Rename one.")
    for separator, name in {";": "semicolons", "\t": "tabs"}.items():
        if len(names) == 1 and separator in names[0]:
            raise DataError(
                f"{path.name}:1: the cells are separated by {name}, not by commas. Save it with "
                "commas."
            )


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path.name}: not a parquet file ({str(error).partition('.')[0]})."
        ) from None
    if (name := _repeated(file.schema_arrow.names)) is not None:
        raise DataError(f"{path.name}: two columns are called {name!r}. Rename one.")
    number = 0
    try:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.name}: damaged after row {number:,} ({str(error).partition('.')[0]})."
        ) from None


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
    names = {list: "a list", str: "a text", bool: "true or false", dict: "an object"}
    return names.get(type(value), "a number")
