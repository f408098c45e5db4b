"""From a TOML file and `key=value` words to a `Config` in which every value knows where it came from.

`key=value` wins over the file, the file over the preset, the preset over the defaults. A mistake becomes one sentence: where
(file and line, or key), what is wrong, what to do.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from quartet.algorithms.presets import ALGORITHMS
from quartet.config import Config

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
"""What the keys are called elsewhere."""


class ConfigError(ValueError):
    """A request that cannot work: one sentence."""


@dataclass(frozen=True)
class Settings:
    """A checked config and the origin of each of its values, by dotted key."""

    config: Config
    origins: Mapping[str, str]
    name: str
    text: str
    """The file as it was written."""


def read_settings(path: Path, words: Sequence[str] = (), shown_as: str | None = None) -> Settings:
    """The config of a TOML file with `key=value` words on top. `shown_as` is what messages call the file."""
    shown = shown_as or str(path)
    try:
        text = path.read_text(encoding="utf-8")
        table: Table = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start}).") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{shown}: not TOML: {error}.") from None
    lines = _line_numbers(text)
    origins = {key: f"{shown}:{_line_of(key, lines)}" for key, _ in _leaves(table)}
    for word in words:
        key, value = _assignment(word)
        _set(table, key, value)
        origins = {k: v for k, v in origins.items() if k != key and not k.startswith(key + ".")}
        origins |= {k: "command line" for k, _ in _leaves(value, key)}
    _expand(table, origins)
    return Settings(_validate(table, origins), origins, path.stem, text)


def resolved_toml(settings: Settings) -> str:
    """The whole config as TOML that gives the same run again, the origin of each value behind it."""
    blocks = list(_blocks("", json_ready(settings.config), settings.origins))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _blocks(name: str, table: Table, origins: Mapping[str, str], header: str = "") -> Iterator[list[str]]:
    """A table as a block of lines, then the tables inside it as blocks of their own."""
    prefix = f"{name}." if name else ""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lists = {key: value for key, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    lines = [
        f"{key} = {toml_value(value)}  # {origins.get(prefix + key, 'default')}"
        for key, value in table.items()
        if key not in tables and key not in lists
    ]
    if lines:
        yield [header, *lines] if header else lines
    for key, inner in tables.items():
        yield from _blocks(prefix + key, inner, origins, f"[{prefix}{key}]")
    for key, rows in lists.items():
        for i, row in enumerate(rows):
            yield from _blocks(f"{prefix}{key}.{i}", row, origins, f"[[{prefix}{key}]]")


def json_ready(config: Config) -> Table:
    """The config as plain tables, without what is not set."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    table: Table = clean(dataclasses.asdict(config))
    return table


def toml_value(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


# --- reading -------------------------------------------------------------------------------------------------------


def _line_numbers(text: str) -> dict[str, int]:
    """The line on which each table and each key at the start of a line is written, by dotted key."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[\s*([\w.\-\"' ]+?)\s*\]\]", line):
            name = header[1]
            prefix = f"{name}.{counts.get(name, 0)}."
            counts[name] = counts.get(name, 0) + 1
        elif header := re.match(r"\s*\[\s*([\w.\-\"' ]+?)\s*\]", line):
            prefix = header[1] + "."
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            lines[prefix + key[1].replace('"', "").replace("'", "")] = number
            continue
        else:
            continue
        lines[prefix.rstrip(".")] = number
    return lines


def _line_of(key: str, lines: Mapping[str, int]) -> int:
    """The line of a key, or of the nearest thing that contains it."""
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = iter(enumerate(value))
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _assignment(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise ConfigError(f'"{word}": not understood. Settings are written key=value, such as optim.lr=1e-5.')
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text  # text without quotes, as shells leave it


def _set(table: Table, key: str, value: Any) -> None:
    *path, last = key.split(".")
    here: Any = table
    for i, name in enumerate(path):
        if isinstance(here, list) and name.isdigit() and int(name) < len(here):
            here = here[int(name)]
            continue
        here = here.setdefault(name, {}) if isinstance(here, dict) else None
        if not isinstance(here, dict | list):
            raise ConfigError(f"{key}: {'.'.join(path[: i + 1])} is a value, not a table.")
    if not isinstance(here, dict):
        raise ConfigError(f"{key}: name one of the list by its number, such as {'.'.join(path)}.0.{last}.")
    here[last] = value


def _expand(table: Table, origins: dict[str, str]) -> None:
    """Write out what a file may leave unsaid: the preset's parts, the kind of critic, the reward model that is trained."""
    stages = table.get("recipe", [])
    if isinstance(stages, str):
        stages = table["recipe"] = [stages]
    rl = next((s for s in stages if isinstance(s, str) and s in ALGORITHMS), None) if isinstance(stages, list) else None
    if isinstance(table.get("critic"), dict):
        table["critic"] = {"type": "separate", **table["critic"]}
    algorithm = table.get("algorithm", {})
    if not isinstance(algorithm, dict):
        raise ConfigError("algorithm: is a table. Write [algorithm] and its keys below.")
    asked = algorithm.pop("preset", rl)
    origin = origins.pop("algorithm.preset", None)
    if rl is None:
        if algorithm or origin:
            raise ConfigError(f"{_where('algorithm', origins)}: the recipe has no RL stage that would read it.")
        table.pop("algorithm", None)
        return
    if asked not in ALGORITHMS:
        raise ConfigError(f"{origin}: algorithm.preset = {toml_value(asked)}: {_one_of(asked, list(ALGORITHMS))}")
    if asked != rl:
        raise ConfigError(f'{origin}: algorithm.preset = "{asked}", but the recipe says "{rl}". Make them the same.')
    preset = _without_none(dataclasses.asdict(ALGORITHMS[rl]))
    table["algorithm"] = _merged(preset, algorithm)
    for key, _ in _leaves(table["algorithm"], "algorithm"):
        origins.setdefault(key, f"preset {rl}" if _has(preset, key.split(".")[1:]) else "default")
    if "reward" not in table and "reward_model" in stages:
        table["reward"] = [{"type": "model"}]
        origins["reward.0.type"] = "recipe"


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def _has(table: Any, path: list[str]) -> bool:
    return not path or (isinstance(table, dict) and path[0] in table and _has(table[path[0]], path[1:]))


def _merged(below: Table, above: Table) -> Table:
    """`above` over `below`, key by key; a table of another type replaces the whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type")
        if same and old:
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged


# --- checking, and saying what is wrong ------------------------------------------------------------------------------


def _validate(table: Table, origins: Mapping[str, str]) -> Config:
    try:
        return TypeAdapter(Config).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise ConfigError(_sentence(unknown_first[0], table, origins)) from None


def _sentence(error: ErrorDetails, table: Table, origins: Mapping[str, str]) -> str:
    path = _path_in_file(error["loc"], table)
    key, value = ".".join(path), error["input"]
    where = _where(key, origins)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"{where}: {key}: no such key.{_suggestion(path)}"
    if kind in {"missing", "missing_argument"}:
        return f"{where}: {key}: is missing.{_description(path)}"
    if kind == "value_error":  # our own sentences
        sentence = str(context["error"])
        named = sentence.partition(":")[0].partition(" ")[0]
        return f"{_where(named, origins)}: {sentence}" if not key else f"{where}: {key}: {sentence}"
    shown = f"{where}: {key} = {toml_value(value)}"
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for name, sign in bounds.items():
        if name in context:
            return f"{shown}: must be {sign} {context[name]:g}.{_description(path)}"
    if kind in {"union_tag_invalid", "literal_error"}:
        choices = re.findall(r"'([^']*)'", str(context.get("expected_tags") or context.get("expected")))
        tag = value.get("type") if kind == "union_tag_invalid" and isinstance(value, dict) else value
        inner = f"{key}.type" if kind == "union_tag_invalid" else key
        return f"{_where(inner, origins)}: {inner} = {toml_value(tag)}: {_one_of(tag, choices)}"
    if kind == "union_tag_not_found":
        return f"{where}: {key}: needs a type."
    if isinstance(value, str) and kind in {"float_type", "int_type", "bool_type"}:
        return f"{shown} is text. Write {path[-1]} = {value}, without quotes."
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "dataclass_type": "a table",
        "tuple_type": "a list",
    }
    return f"{shown}: {'must be ' + wanted[kind] if kind in wanted else error['msg']}."


def _path_in_file(location: tuple[int | str, ...], table: Table) -> list[str]:
    """pydantic's location without the tags of unions, which are no keys of the file."""
    path: list[str] = []
    here: Any = table
    for i, step in enumerate(location):
        last = i == len(location) - 1
        if isinstance(here, dict):
            if step not in here and (not last or here.get("type") == step):
                continue
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue  # the tag or type name of a union's member
        path.append(str(step))
    return path


def _where(key: str, origins: Mapping[str, str]) -> str:
    """The origin of a key, or of the first thing below or above it that has one."""
    while key:
        for dotted, origin in origins.items():
            if dotted == key or dotted.startswith(key + "."):
                return origin
        key = key.rpartition(".")[0]
    return next((o.rpartition(":")[0] for o in origins.values() if ":" in o), "command line")


def _one_of(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"not one of {', '.join(choices)}.{f' Did you mean {near[0]}?' if near else ''}"


def _suggestion(path: Sequence[str]) -> str:
    """The known key that was meant: by its name here, by its name elsewhere, or in another table."""
    *table, name = path
    here = ".".join(table)
    known = list(_known_keys(Config))
    siblings = [key.removeprefix(here + ".") if here else key for key in known if key.startswith(here)]
    names = list(dict.fromkeys([*(s for s in siblings if "." not in s), *SYNONYMS, *(k.rpartition(".")[2] for k in known)]))
    for near in difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        meant = SYNONYMS.get(near, near)
        candidates = [k for k in known if k == meant or k.endswith("." + meant)]
        best = max(candidates, key=lambda k: (k.startswith(here + "."), -len(k)), default=None)
        if best is not None:
            return f" Did you mean {best}?"
    choices = sorted({s.partition(".")[0] for s in siblings})
    return f" {here or 'At the top'} has {', '.join(choices)}." if choices else ""


def _description(path: Sequence[str]) -> str:
    """The second sentence of an error: what the key's declaration says of it."""
    for owner, field in _fields(Config, list(path)):
        default = field.default if field.default is not dataclasses.MISSING else None
        description = getattr(default, "description", None) or owner.__pydantic_fields__[field.name].description
        if description:
            return f" {description}"
    return ""


def _fields(owner: Any, path: list[str]) -> Iterator[tuple[Any, Any]]:
    """The declarations that a path may lead to: one, or one for each member of a union that has the key."""
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
    """The parts that a type hint mentions, through unions, lists and annotations."""
    if dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in {typing.Union, types.UnionType, tuple, typing.Annotated}:
        for inner in typing.get_args(hint):
            yield from _parts_in(inner)
