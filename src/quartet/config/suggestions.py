"""What was probably meant by a key that Quartet does not know."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quartet.config.other_libraries import Equivalent, answer_to, answers
from quartet.config.read_by import REWARDED, roles_that_read
from quartet.config.tables import Config
from quartet.parts import Family
from quartet.stages.kinds import RL, kind_of

LIKE, VERY_LIKE = 0.7, 0.85
"""How alike two names must be, from 0 to 1: within one table, and anywhere."""


def about_unknown(path: Sequence[str], value: Any, table: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key that a message about an unknown key should name, and the rest of the message.

    `path` leads to the unknown key in the file's `table`, and `value` is what it has there. If it
    is itself a table, the message is about the first key in it that Quartet can answer.
    """
    key = ".".join(path)
    if (other := _of_another_type(path, table)) is not None:
        return key, other
    if isinstance(value, dict) and value:
        leaves = list(_leaves(value, key))
        # A name of another library that is listed with its tables, such as reference.model.
        is_listed = any(leaf in answers() for leaf in leaves)
        if not is_listed and (near := _near(path)) is not None:
            return key, f"no such key. Did you mean {near}?"
        for below in leaves:
            if (words := _meant(below.split("."), table)) is not None:
                return below, f"no such key. {words}"
    words = _meant(path, table) or _choices(path, table)
    return key, "no such key." + (f" {words}" if words else "")


def option_in_words(name: str) -> str | None:
    """Return a sentence about an option of the command line that is a key of a config, or another
    library's option; None if it is neither. `name` is without its dashes."""
    key = name.replace("-", "_")
    if key in known_keys():
        return f"Did you mean {key}?"
    return _meant(key.split("."), {})


def _meant(path: Sequence[str], table: Mapping[str, Any]) -> str | None:
    """Return a sentence about what was meant; None if nothing is like it."""
    names = [name.replace("-", "_") for name in path if not name.isdigit()]
    here, name = ".".join(names[:-1]), names[-1]
    answer = answer_to(".".join(names))
    within = [] if answer is None or not here else _within(here, answer.keys)
    if answer is not None and within:
        return _in_words(within, answer.note)
    if here and (inner := [k for k in _within(here, known_keys()) if k.endswith(f".{name}")]):
        return f"Did you mean {inner[0]}?"
    for start in range(1, len(names) - 1):
        if (ending := ".".join(names[start:])) in known_keys():
            note = f"[{names[0]}] has no keys of other tables." if names[0] in known_keys() else ""
            return _in_words([ending], note)
    joined = [k for k in known_keys() if k.rpartition(".")[2] == "_".join(names[-2:])]
    if here and joined:
        return f"Did you mean {read_by_recipe(joined, table)[0]}?"
    if answer is not None:
        return _in_words(read_by_recipe(answer.keys, table), answer.note)
    if (near := _near(path)) is not None:
        return f"Did you mean {near}?"
    return _near_anywhere(here, name, table)


def _near(path: Sequence[str]) -> str | None:
    """Return the key of the same table whose name is most like the last of a path."""
    *tables, name = [step for step in path if not step.isdigit()]
    siblings = {field.name for owner in _owners(tables) for field in dataclasses.fields(owner)}
    near = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=LIKE)
    return ".".join([*tables, near[0]]) if near else None


def _near_anywhere(here: str, name: str, table: Mapping[str, Any]) -> str | None:
    """Return a sentence about the key, here or in another library, whose name is most like one."""
    names = [*(option for option in answers() if "." not in option)]
    names += [key.rpartition(".")[2] for key in known_keys()]
    near = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=1, cutoff=VERY_LIKE)
    if not near:
        return None
    ours = tuple(key for key in known_keys() if key.rpartition(".")[2] == near[0])
    answer = answers().get(near[0], Equivalent(ours))
    keys = _within(here, answer.keys) or read_by_recipe(answer.keys, table)
    return _in_words(keys, answer.note) if answer.keys else None


def _in_words(keys: Sequence[str], note: str) -> str:
    """Return a sentence about the keys that may be meant, and the note about them."""
    *others, last = keys or [""]
    meant = f"{', '.join(others)} or {last}" if others else last
    return " ".join(filter(None, [f"Did you mean {meant}?" if meant else "", note]))


def _within(here: str, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key.startswith(f"{here}.")]


def read_by_recipe(keys: Sequence[str], table: Mapping[str, Any]) -> Sequence[str]:
    """Return the keys that the table's recipe reads, all of them if it reads none."""
    stages = table.get("recipe", ())
    stages = [stages] if isinstance(stages, str) else stages if isinstance(stages, list) else []
    kinds = [kind for stage in stages if (kind := kind_of(str(stage))) is not None]
    names = {kind.name for kind in kinds}
    if RL in kinds or "online_dpo" in stages:
        names.add(REWARDED)
    read = [k for k in keys if (roles := roles_that_read(k)) is None or roles & names]
    return read or keys


def _of_another_type(path: Sequence[str], table: Mapping[str, Any]) -> str | None:
    """Return the message about a key that other types of its part have; None if none has it."""
    *tables, name = path
    have = [
        _type_of(owner)
        for owner in _owners([step for step in tables if not step.isdigit()])
        if name in {field.name for field in dataclasses.fields(owner)}
    ]
    kind = _table_at(table, tables).get("type")
    if not have or not isinstance(kind, str):
        return None
    types_with = " and ".join(f'"{each}"' for each in have)
    return (
        f'no such key for type = "{kind}"; {types_with} {"has" if len(have) == 1 else "have"} it. '
        "Take it out, or set the type."
    )


def _choices(path: Sequence[str], table: Mapping[str, Any]) -> str:
    """Return a sentence that lists the keys of the table in which an unknown key stands."""
    tables = list(path[:-1])
    owners = _owners([step for step in tables if not step.isdigit()])
    kind = _table_at(table, tables).get("type")
    of_type = [owner for owner in owners if _type_of(owner) == kind]
    fields = {field.name for owner in of_type or owners for field in dataclasses.fields(owner)}
    here = f"{'.'.join(tables)} has" if tables else "The top level has"
    return f"{here} {', '.join(sorted(fields))}." if fields else ""


def _table_at(table: Any, path: Sequence[str]) -> Mapping[str, Any]:
    """Return the table at a path, an empty one if there is none."""
    for step in path:
        if isinstance(table, list):
            table = table[int(step)] if step.isdigit() and int(step) < len(table) else None
        else:
            table = table.get(step) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the dotted keys below a table."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}"


# --- the declarations


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Return all dotted keys of a config."""
    return (*dict.fromkeys(keys_of(Config)), "algorithm.preset")


def keys_of(owner: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a table that a class declares."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        yield prefix + field.name
        for part in _parts_in(hints[field.name]):
            yield from keys_of(part, f"{prefix}{field.name}.")


def description_of(path: Sequence[str], root: Any = Config) -> str:
    """Return the description in a key's declaration; "" if it has none. `root` declares the table
    that the path begins in."""
    for owner, field in declarations(path, root):
        if (
            description := getattr(field.default, "description", None)
            or owner.__pydantic_fields__[field.name].description
        ):
            return str(description)
    return ""


def declarations(
    path: Sequence[str], root: Any = Config
) -> Iterator[tuple[Any, "dataclasses.Field[Any]"]]:
    """Yield the classes that declare a key, with its field: several if it is of a part."""
    *tables, name = [step for step in path if not step.isdigit()] or [""]
    for owner in _owners(tables, root):
        for field in dataclasses.fields(owner):
            if field.name == name:
                yield owner, field


def may_be_left_out(path: Sequence[str]) -> bool:
    """Return whether a setting has no value unless one is given."""
    return any(
        owner.__pydantic_fields__[field.name].default is None for owner, field in declarations(path)
    )


def _owners(tables: Sequence[str], root: Any = Config) -> list[Any]:
    """Return the classes that declare the keys of a table: one, or one for each type of a part."""
    owners: list[Any] = [root]
    for table in tables:
        owners = [
            part
            for owner in owners
            for name, hint in typing.get_type_hints(owner).items()
            if name == table
            for part in _parts_in(hint)
        ]
    return owners


def _type_of(owner: Any) -> str | None:
    """Return the type of a part; None if the class is no part."""
    field = owner.__pydantic_fields__.get("type")
    return None if field is None else str(field.default)


def _parts_in(hint: Any) -> Iterator[Any]:
    """Yield the parts in a type hint, also inside unions, lists and annotations."""
    if isinstance(hint, type) and Family in hint.__bases__:
        yield from hint.members.values()  # type: ignore[attr-defined]
    elif dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in {typing.Union, types.UnionType, tuple, typing.Annotated}:
        for inner in typing.get_args(hint):
            yield from _parts_in(inner)
