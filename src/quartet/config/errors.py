"""Sentences about mistakes in a config: one from each error of pydantic's, with the place and the
remedy."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from quartet.config.suggestions import about_unknown, description_of, known_keys
from quartet.io.texts import did_you_mean

Table = dict[str, Any]

WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}


REMEDIES = (
    ("Invalid value", r"(True|False)\b", "Write true and false in lower case."),
    (
        "Invalid value",
        r"(None|none|null|nil)\b",
        "TOML has no empty value: leave the line out for the default.",
    ),
    ("Invalid value", r"\.\d", "Write a 0 before the point."),
    ("Invalid value", "$", "Give a value, or leave the line out for the default."),
    ("Invalid value", r"(?!true|false|inf|nan)[A-Za-z_~/]", "Write text in quotes."),
    ("Expected '='", "", "Settings are written key = value."),
    ("", r",\d", "Write numbers with a point."),
    ("", "$", "Is a quote or a bracket missing?"),
)
"""What to do about a text that is not TOML: how the parser's reason begins, what stands at the
place that it names, and the words."""


def about_syntax(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Return what follows a file's name in the sentence about a text that is not TOML: the line,
    what is wrong, what to do."""
    reason, lines = str(error), text.split("\n")
    found = re.search(r" \(at line (\d+), column (\d+)\)$", reason)
    if found is None:  # at the end of the document
        return f":{len(lines) - text.endswith(chr(10))}: not TOML: {reason}."
    line, column = int(found[1]), int(found[2])
    reason, row = reason[: found.start()], lines[line - 1] if line <= len(lines) else ""
    if table := re.match(r"Cannot declare \((.*?),?\) twice", reason):
        name = table[1].replace("'", "").replace(", ", ".")
        return f":{line}: the table {name} is there twice. Put its keys under one header."
    key = re.match(r"\s*([^=\[]+?)\s*=", row)
    if reason == "Cannot overwrite a value" and key:
        return f":{line}: {key[1]} is there twice in its table. Keep one of the two lines."
    rest = row[column - 1 :]
    remedies = (
        f" {words}" for why, at, words in REMEDIES if reason.startswith(why) and re.match(at, rest)
    )
    remedy = next(remedies, "")
    return f":{line}: not TOML: {reason} (column {column}).{remedy}"


def sentence(
    error: ErrorDetails,
    table: Table,
    origins: Mapping[str, str],
    describe: Callable[[Sequence[str]], str] = description_of,
) -> str:
    """Return the sentence about an error: its place, its key and value, and what is right.
    `describe` returns what a key means."""
    path = _path_in_file(error["loc"], table)
    key, value = ".".join(path), error["input"]
    place = where(key, origins)
    kind, context = error["type"], error.get("ctx", {})
    description = f" {words}" if (words := describe(path)) else ""
    if kind == "unexpected_keyword_argument":
        named, message = about_unknown(path, value, table)
        return f"{where(named, origins)}: {named}: {message}"
    if kind in {"missing", "missing_argument"}:
        return f"{place}: {key}: is missing.{description}"
    if kind == "value_error":  # our own sentences
        sentence = str(context["error"])
        named = sentence.partition(":")[0].partition(" ")[0]
        return f"{where(named, origins)}: {sentence}" if not key else f"{place}: {key}: {sentence}"
    shown = f"{place}: {key} = {in_short(value)}"
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for name, sign in bounds.items():
        if name in context:
            return f"{shown}: must be {sign} {context[name]:g}.{description}"
    if kind in {"union_tag_invalid", "literal_error"}:
        choices = re.findall(
            r"'([^']*)'", str(context.get("expected_tags") or context.get("expected"))
        )
        tag = (
            value.get("type") if kind == "union_tag_invalid" and isinstance(value, dict) else value
        )
        inner = f"{key}.type" if kind == "union_tag_invalid" else key
        return f"{where(inner, origins)}: {inner} = {in_short(tag)}: {one_of(tag, choices)}"
    if kind == "union_tag_not_found":
        return f"{place}: {key}: needs a type."
    if isinstance(value, str) and kind in {"float_type", "int_type", "bool_type"}:
        if not re.fullmatch(r"\s*([-+]?[\d_.]+(e[-+]?\d+)?|true|false)\s*", value, re.IGNORECASE):
            return f"{shown}: must be {WANTED[kind]}."
        return f"{shown} is text. Write {path[-1]} = {value}, without quotes."
    example = ""
    if kind == "dataclass_type" and isinstance(value, str) and f"{key}.type" in known_keys():
        example = f", such as {path[-1]} = {toml_value({'type': value})}"
    return f"{shown}: {'must be ' + WANTED[kind] if kind in WANTED else error['msg']}{example}."


def _path_in_file(location: tuple[int | str, ...], table: Table) -> list[str]:
    """Return the keys of the file on the way to an error. pydantic's location also has the tags of
    unions and the names of types, which are no keys."""
    path: list[str] = []
    here: Any = table
    for i, step in enumerate(location):
        last = i == len(location) - 1
        if isinstance(here, dict) and (step in here or last):
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue
        path.append(str(step))
    return path


def where(key: str, origins: Mapping[str, str]) -> str:
    """Return the origin of a key, or of the first key below or above it that has one."""
    while key:
        for dotted, origin in origins.items():
            if dotted == key or dotted.startswith(key + "."):
                return origin
        key = key.rpartition(".")[0]
    given = (o for o in origins.values() if ":" in o or o.startswith("quartet."))
    origin = next(given, "command line")
    return origin.rpartition(":")[0] or origin


def one_of(value: Any, choices: Sequence[str]) -> str:
    """Return a phrase that lists the choices and suggests the one most like the value. A family
    of which Quartet has no member has none."""
    if not any(choices):
        return "no such type. Name a class of yours: file.py:Name."
    return f"not one of {', '.join(choices)}.{did_you_mean(value, choices)}"


def in_short(value: Any, most: int = 120) -> str:
    """Return a value in TOML, cut to `most` characters."""
    text = toml_value(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def toml_value(value: Any) -> str:
    """Return a value in TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
