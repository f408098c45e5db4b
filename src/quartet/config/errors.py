"""Sentences about mistakes in a config: one from each error of pydantic's, with the place and the
remedy."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from quartet.config.tables import Config
from quartet.io.texts import did_you_mean
from quartet.parts import Family

Table = dict[str, Any]

SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "prompts_per_step",
    "num_generations": "samples_per_prompt",
    "num_ppo_epochs": "epochs",
    "num_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "max_tokens": "max_new_tokens",
    "response_length": "max_new_tokens",
    "max_steps": "steps",
    "kl_coef": "kl.coef",
    "beta": "kl.coef",
    "cliprange": "policy_loss",
    "clip_range": "policy_loss",
    "lambda": "lam",
    "model_name_or_path": "model",
    "dataset": "train",
}
"""Names that other libraries have for keys, and the keys."""


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


def sentence(error: ErrorDetails, table: Table, origins: Mapping[str, str]) -> str:
    """Return the sentence about an error: its place, its key and value, and what is right."""
    path = _path_in_file(error["loc"], table)
    key, value = ".".join(path), error["input"]
    place = where(key, origins)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"{place}: {key}: no such key.{_suggestion(path)}"
    if kind in {"missing", "missing_argument"}:
        return f"{place}: {key}: is missing.{_description(path)}"
    if kind == "value_error":  # our own sentences
        sentence = str(context["error"])
        named = sentence.partition(":")[0].partition(" ")[0]
        return f"{where(named, origins)}: {sentence}" if not key else f"{place}: {key}: {sentence}"
    shown = f"{place}: {key} = {in_short(value)}"
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for name, sign in bounds.items():
        if name in context:
            return f"{shown}: must be {sign} {context[name]:g}.{_description(path)}"
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
    return f"{shown}: {'must be ' + WANTED[kind] if kind in WANTED else error['msg']}."


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
    return next((o.rpartition(":")[0] for o in origins.values() if ":" in o), "command line")


def one_of(value: Any, choices: Sequence[str]) -> str:
    """Return a phrase that lists the choices and suggests the one most like the value."""
    return f"not one of {', '.join(choices)}.{did_you_mean(value, choices)}"


def _suggestion(path: Sequence[str]) -> str:
    """Return a sentence with the key that was probably meant: one of the same table with a similar
    name, one that another library calls so, or one of another table."""
    *table, name = path
    here = ".".join(table)
    known = list(_known_keys(Config))
    siblings = [
        key.removeprefix(here + ".") if here else key for key in known if key.startswith(here)
    ]
    names = list(
        dict.fromkeys(
            [
                *(s for s in siblings if "." not in s),
                *SYNONYMS,
                *(k.rpartition(".")[2] for k in known),
            ]
        )
    )
    for near in difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        meant = near if near in siblings else SYNONYMS.get(near, near)
        candidates = [k for k in known if k == meant or k.endswith("." + meant)]
        best = max(candidates, key=lambda k: (k.startswith(here + "."), -len(k)), default=None)
        if best is not None:
            return f" Did you mean {best}?"
    choices = sorted({s.partition(".")[0] for s in siblings})
    return f" {here or 'At the top'} has {', '.join(choices)}." if choices else ""


def _description(path: Sequence[str]) -> str:
    """Return the description in a key's declaration, which is the second sentence of an error."""
    for owner, field in _fields(Config, list(path)):
        default = field.default if field.default is not dataclasses.MISSING else None
        description = (
            getattr(default, "description", None)
            or owner.__pydantic_fields__[field.name].description
        )
        if description:
            return f" {description}"
    return ""


def _fields(owner: Any, path: list[str]) -> Iterator[tuple[Any, Any]]:
    """Yield the declarations that a path leads to: one, or one for each member of a union that has
    the key."""
    if not path:
        return
    for field in dataclasses.fields(owner):
        if field.name != path[0]:
            continue
        rest = path[2:] if len(path) > 1 and path[1].isdigit() else path[1:]
        if not rest:
            yield owner, field
        for part in _parts_in(typing.get_type_hints(owner, include_extras=False)[field.name]):
            yield from _fields(part, rest)


def _known_keys(owner: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        yield prefix + field.name
        for part in _parts_in(hints[field.name]):
            yield from _known_keys(part, f"{prefix}{field.name}.")


def _parts_in(hint: Any) -> Iterator[Any]:
    """Yield the parts in a type hint, also inside unions, lists and annotations."""
    if isinstance(hint, type) and Family in hint.__bases__:
        yield from hint.members.values()  # type: ignore[attr-defined]
    elif dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in {typing.Union, types.UnionType, tuple, typing.Annotated}:
        for inner in typing.get_args(hint):
            yield from _parts_in(inner)


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
