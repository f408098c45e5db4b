"""Paths in a config that lead over links.

A link such as `runs/latest` changes with later runs, so a run keeps the place that the link led to
when the run began.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PATHS = (
    "data.texts",
    "data.train",
    "data.eval",
    "data.pretraining",
    "data.shape",
    "sft.data",
    "reward_model.data",
    "reward_model.model",
    "preference.data",
    "ilql.data",
    "policy.model",
    "policy.tokenizer",
    "policy.chat_template",
    "reference.model",
    "label.earlier",
    "evaluation.policy",
    "critic.init",
    "generator.shared",
    "environment.function",
    "reward.*.model",
    "reward.*.models",
    "reward.*.function",
    "reward.*.prompt",
    "reward.*.rubric",
    "reward.*.cache",
    "reward.*.schema_file",
    "run.loop",
    "run.metrics",
)
"""Keys whose values are, or can be, files or folders."""
NAMES = {"critic.init": ("policy", "reward_model"), "policy.chat_template": ("chatml",)}
"""Values of these keys that are not paths, even if there is a file of that name."""


def resolve_links(table: dict[str, Any], known: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Replace the paths in a table that lead over links by where they lead. Return, by key, the
    path in the config and the path that replaced it. `known` holds, for a run that is resumed,
    where its paths led when it began."""
    resolved = {}
    for holder, name, key in _paths(table):
        written = holder[name]
        if (place := known.get(written) or where(written)) != written:
            holder[name] = place
            resolved[key] = written, place
    return resolved


def where(written: str) -> str:
    """Return where a path leads over links. Of a folder all links are resolved, of a file (and of
    `file.py:name`) only those of its folder. A path without links, or to nothing, is returned as it
    is; one below the working directory stays relative."""
    file, colon, name = written.rpartition(":") if ".py:" in written else (written, "", "")
    path, here = Path(file), Path.cwd()
    try:
        if not path.exists():
            return written
        real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    except (OSError, ValueError):
        return written
    if real == Path(os.path.abspath(path)):  # noqa: PTH100  links are what it must not follow
        return written
    return f"{real.relative_to(here) if real.is_relative_to(here) else real}{colon}{name}"


def relative_paths(table: dict[str, Any]) -> list[Path]:
    """Return the relative paths in a table of settings; hub ids, which look the same, are among
    them."""
    written = [holder[name] for holder, name, _ in _paths(table)]
    paths = [Path(text.rpartition(":")[0] if ".py:" in text else text) for text in written]
    return [path for path in paths if not path.is_absolute()]


def absolute_word(word: str) -> str:
    """Return a `key=value` word whose value, if it is a path that is there, is absolute."""
    key, _, value = word.partition("=")
    pattern = ".".join("*" if part.isdigit() else part for part in key.split("."))
    plain = value.strip("\"'")
    path = Path(plain.rpartition(":")[0] if ".py:" in plain else plain)
    try:
        if (
            pattern not in PATHS
            or plain in NAMES.get(pattern, ())
            or path.is_absolute()
            or not path.exists()
        ):
            return word
    except (OSError, ValueError):
        return word
    return f"{key}={json.dumps(str(Path.cwd() / plain))}"


def _paths(table: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield the texts at the keys of PATHS: the table or list that holds each, its key or index
    there, and its dotted key."""
    for pattern in PATHS:
        for holder, name, key in _found(table, pattern.split("."), ""):
            value, judges = holder[name], isinstance(holder, dict) and holder.get("type") == "judge"
            if judges and name == "model":  # a name at the judge's endpoint, no path
                continue
            if isinstance(value, str) and value not in NAMES.get(pattern, ()):
                yield holder, name, key
            elif isinstance(value, list):
                yield from (
                    (value, i, f"{key}.{i}")
                    for i, text in enumerate(value)
                    if isinstance(text, str)
                )
    yield from _own_parts(table, "")


def _own_parts(value: Any, prefix: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield the types of the user's own parts, `file.py:Name`, wherever they are in a table."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for name, item in items:
        if name == "type" and isinstance(item, str) and ".py:" in item:
            yield value, name, f"{prefix}{name}"
        else:
            yield from _own_parts(item, f"{prefix}{name}.")


def _found(table: Any, path: list[str], prefix: str) -> Iterator[tuple[Any, Any, str]]:
    name, *rest = path
    items: list[Any]
    if name == "*":
        items = list(enumerate(table)) if isinstance(table, list) else []
    else:
        items = [(name, table[name])] if isinstance(table, dict) and name in table else []
    for key, value in items:
        if rest:
            yield from _found(value, rest, f"{prefix}{key}.")
        else:
            yield table, key, f"{prefix}{key}"
