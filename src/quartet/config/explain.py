"""What a setting means: its description, what it may be and its default, from its declaration."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quartet.config.suggestions import (
    about_unknown,
    declarations,
    description_of,
    keys_of,
    known_keys,
)
from quartet.errors import QuartetError
from quartet.io.texts import did_you_mean
from quartet.parts import Family

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def setting_in_words(key: str) -> str:
    """Return what a key of a run's file means, and for a table, what it has, one key a line.
    `key` is dotted, such as "optim.lr". Raises `QuartetError` for an unknown one."""
    if key == "algorithm.preset":
        return "algorithm.preset   text\nA preset to start from: `quartet algorithms` lists them."
    if key not in known_keys():
        _, message = about_unknown(key.split("."), None, {})
        raise QuartetError(f"{key}: {message}")
    table, _, last = key.rpartition(".")
    if last == "type" and (types := types_of(table)):
        return "\n".join(
            [f"{key}   {one_of_them([_value(each) for each in types])}", *_types(types)]
        )
    lines = headlines(key)
    if meaning := meaning_of(key):
        lines.append(meaning)
    lines += _types(types_of(key))
    width = max((len(inner) for inner in inside(key)), default=0)
    for inner in inside(key):
        if not inner.endswith(".type"):
            lines.append(f"  {inner:{width}}  {_first(description_of(inner.split('.')))}".rstrip())
    return "\n".join(lines)


def key_in_words(key: str, name: str, table: Any) -> str:
    """Return what a key means of a table that the class `table` declares, and for a table what it
    has, one key a line. Raises `QuartetError` for an unknown one."""
    known = [name, *keys_of(table, f"{name}.")]
    if key not in known:
        raise QuartetError(f"{key}: no such key.{did_you_mean(key, known)}")

    def described(each: str) -> str:
        return description_of(each.split(".")[1:], table)

    if key == name:
        lines = [f"{key}   a table", inspect.cleandoc(table.__doc__ or "")]
    else:
        [(owner, field)] = declarations(key.split(".")[1:], table)
        lines = [f"{key}   {', '.join(_facts(owner, field))}", described(key)]
    within = [each for each in known if each.rpartition(".")[0] == key]
    width = max(map(len, within), default=0)
    return "\n".join(lines + [f"  {each:{width}}  {_first(described(each))}" for each in within])


def headlines(key: str) -> list[str]:
    """Return what the value of a known key may be, its bounds and its default: a line for each part
    that has the key with other ones."""
    lines = []
    for owner, field in declarations(key.split(".")):
        has_own = _has_type(owner) and field.name != "type"
        within = f'   where type = "{_type(owner)}"' if has_own else ""
        lines.append(f"{key}   {', '.join(_facts(owner, field))}{within}")
    return list(dict.fromkeys(lines))


def meaning_of(key: str) -> str:
    """Return the description of a known key; of a table without one, what its class says."""
    classes = _classes_of(key)
    if description := description_of(key.split(".")):
        return description
    return inspect.cleandoc(classes[0].__doc__ or "") if len(classes) == 1 else ""


def types_of(key: str) -> dict[str, str]:
    """Return the types of a part with the first sentence of each; none if the key is no part."""
    classes = _classes_of(key)
    return {_type(each): _first(each.__doc__ or "") for each in classes} if len(classes) > 1 else {}


def _types(types: Mapping[str, str]) -> list[str]:
    """Return a line for each type of a part."""
    width = max(map(len, types), default=0) + 2
    return [f"  type = {_value(name):{width}}   {meaning}" for name, meaning in types.items()]


def inside(key: str) -> list[str]:
    """Return the keys of a table, without those of the tables in it."""
    depth = key.count(".") + 1
    return [k for k in known_keys() if k.startswith(f"{key}.") and k.count(".") == depth]


def _classes_of(key: str) -> list[Any]:
    """Return the classes that the table of a key may be; of several declarations, the last."""
    classes: list[Any] = []
    for owner, field in declarations(key.split(".")):
        classes = [*dict.fromkeys(_classes(typing.get_type_hints(owner)[field.name]))]
    return classes


def _classes(hint: Any) -> Iterator[Any]:
    """Yield the classes of a table: several where it is a part."""
    if isinstance(hint, type) and Family in hint.__bases__:
        yield from (each for each in hint.members.values() if not each.internal)  # type: ignore[attr-defined]
    elif dataclasses.is_dataclass(hint):
        yield hint
    else:
        for inner in typing.get_args(hint):
            yield from _classes(inner)


def _type(part: Any) -> str:
    return str(part.__pydantic_fields__["type"].default) if _has_type(part) else part.__name__


def _has_type(part: Any) -> bool:
    return "type" in part.__pydantic_fields__


def _first(description: str) -> str:
    """Return the first sentence."""
    text = " ".join(description.split())
    return re.split(r"(?<!al)(?<!eq)(?<!Dr)[.:]\s", text)[0].rstrip(".:")


def _facts(owner: Any, field: "dataclasses.Field[Any]") -> Iterator[str]:
    """Yield what the value may be, its bounds, and its default."""
    info = owner.__pydantic_fields__[field.name]
    yield _kind(typing.get_type_hints(owner)[field.name])
    for bound in info.metadata:
        yield from (
            f"{sign} {getattr(bound, name):g}"
            for name, sign in SIGNS.items()
            if getattr(bound, name, None) is not None
        )
    if info.is_required():
        yield "required"
    elif info.default_factory is None and not dataclasses.is_dataclass(info.default):
        yield f"default {_value(info.default)}"


def _kind(hint: Any) -> str:
    """Return a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in NAMES:
        return NAMES[hint]
    if isinstance(hint, type) and Family in hint.__bases__:
        return "a table"
    if dataclasses.is_dataclass(hint):
        return "a table"
    if origin is typing.Literal:
        return one_of_them([_value(value) for value in inner])
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin in {typing.Union, types.UnionType}:
        return one_of_them(list(dict.fromkeys(_kind(x) for x in inner if x is not type(None))))
    if origin in {tuple, list}:
        return f"a list, each {_kind(inner[0])}"
    return "a table"


def _value(value: Any) -> str:
    """Return a value as it is written in a file."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def one_of_them(words: Sequence[str]) -> str:
    """Return words with commas, and "or" before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
