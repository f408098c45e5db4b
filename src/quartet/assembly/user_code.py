"""The files that a run's user wrote: parts, reward functions and environments of their own."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.recording.metric import Metric


def code_files(config: Any) -> dict[str, Path]:
    """Return the files whose code shapes what a run learns, by the file or module name that the
    config has for them. Metrics are left out, for they change nothing that is learnt."""
    files: dict[str, Path] = {}
    for record in _records(config):
        if isinstance(record, Metric):
            continue
        for place, file in (_of_class(record), *map(_of_reference, _references(record))):
            if file is not None and file.is_file():
                files[place] = file
    return files


def _records(value: Any) -> Iterator[Any]:
    """Yield every dataclass instance in a config, from the outside in."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _records(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _records(item)


def _of_class(record: Any) -> tuple[str, Path | None]:
    """Return the file of a part's class, None for Quartet's own; a class that was written in no
    file, as in a notebook, has none either."""
    module = type(record).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] == "quartet" or file is None:
        return "", None
    place, colon, _ = str(getattr(record, "type", "")).rpartition(":")
    return (place if colon else file), Path(file)


def _references(record: Any) -> list[str]:
    """Return what a table names by `function` or `loop`."""
    named = (getattr(record, name, None) for name in ("function", "loop"))
    return [name for name in named if isinstance(name, str)]


def _of_reference(reference: str) -> tuple[str, Path | None]:
    """Return the file of a function or class, by its name in a config."""
    place, _, _ = reference.rpartition(":" if ":" in reference else ".")
    if place.endswith(".py"):
        return place, Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return place, None
    return place, None if spec is None or spec.origin is None else Path(spec.origin)
