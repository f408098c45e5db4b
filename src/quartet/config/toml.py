"""Reads a TOML file and `key=value` words into a `Config`, and keeps the origin of each value.

`key=value` words replace the file's values, the file's replace the preset's, and the preset's the
defaults. A mistake is reported in one sentence: where it is (file and line, or key), what is wrong,
what to do.
"""

import copy
import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.correction import for_another_engine
from quartet.algorithms.preference import PREFERENCES, PreferenceLoss
from quartet.algorithms.presets import ALGORITHMS
from quartet.config.errors import Table, about_syntax, sentence, toml_value, where
from quartet.config.links import resolve_links
from quartet.config.read_by import roles_that_read
from quartet.config.replaced import (
    replace_created_policy,
    replace_length,
    replace_preset,
    replace_trained_reward,
    rl_stage_of,
)
from quartet.config.suggestions import may_be_left_out
from quartet.config.tables import Config, json_ready, without_none
from quartet.errors import QuartetError
from quartet.generation.source import GeneratorSource, Servers
from quartet.io.texts import did_you_mean, line_of, not_utf8
from quartet.stages.kinds import KINDS

NONE = "none"
"""The value of a word that takes a setting away: `policy.adapter=none`."""
FOR_SERVERS = "default with servers"
"""The origin of the correction that a run with servers has where its file names none."""


class ConfigError(QuartetError, ValueError):
    """A config that cannot work. The message is one sentence."""


@dataclass(frozen=True)
class Settings:
    """A checked config and the origin of each of its values, by dotted key."""

    config: Config
    origins: Mapping[str, str]
    name: str
    text: str
    """The text of the file."""
    links: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Paths that led over links, by key: as they were written, and where they led."""
    notes: tuple[str, ...] = ()
    """Sentences about settings of the file that the command line made meaningless."""


@dataclass(frozen=True)
class TomlFile:
    """The content of a TOML file, not checked yet."""

    table: Table
    origins: Mapping[str, str]
    """The file and line of each value, by dotted key."""
    name: str
    text: str


def read_settings(
    path: Path,
    words: Sequence[str] = (),
    shown_as: str | None = None,
    known_links: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Return the settings of a TOML file, with `key=value` words on top.

    Paths that lead over links are replaced by where they lead. `shown_as` is what messages call the
    file. `known_links` holds, for a run that is resumed, where its paths led when it began. Raises
    `ConfigError`.
    """
    return settings_in(read_toml(path, shown_as), words, known_links)


def settings_in(
    file: TomlFile,
    words: Sequence[str] = (),
    known_links: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Return the settings that a file's content gives, with `key=value` words on top. Raises
    `ConfigError`."""
    if "sweep" in file.table:
        raise ConfigError(
            f"{where('sweep', file.origins)}: sweep: belongs to quartet sweep. Run the file with: "
            "quartet sweep FILE.toml"
        )
    table = copy.deepcopy(file.table)
    return _settings(table, dict(file.origins), words, file.name, file.text, known_links)


def read_toml(path: Path, shown_as: str | None = None) -> TomlFile:
    """Return the content of a TOML file, which messages call `shown_as`. Raises `ConfigError`."""
    shown = shown_as or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        table: Table = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file.") from None
    except UnicodeDecodeError as error:
        words = not_utf8(error, f"byte {error.start} of the file")
        raise ConfigError(f"{shown}:{line_of(error)}: {words}") from None
    except IsADirectoryError:
        raise ConfigError(f"{shown}: is a folder, not a file.") from None
    except (OSError, RecursionError) as error:
        raise ConfigError(
            f"{shown}: cannot be read ({getattr(error, 'strerror', None) or 'too deep'})."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{shown}{about_syntax(error, text)}") from None
    except ValueError as error:  # a name with a NUL in it, a number of thousands of digits
        raise ConfigError(f"{shown}: cannot be read ({str(error).partition(';')[0]}).") from None
    lines = _line_numbers(text)
    origins = {key: f"{shown}:{_line_of(key, lines)}" for key, _ in leaves(table)}
    return TomlFile(table, origins, path.stem, text)


def settings_of_table(table: Table, name: str, origin: str) -> Settings:
    """Return the settings of a config that was written in Python, as nested dicts.

    `name` is what the run is called, `origin` what messages say of where a value came from. The
    text of the settings is the TOML file that gives the same run. Raises `ConfigError` as
    `read_settings` does.
    """
    text = table_toml(table)
    parsed = tomllib.loads(text)
    origins = {key: origin for key, _ in leaves(parsed)}
    return _settings(parsed, origins, (), name, text, {})


def table_toml(table: Table) -> str:
    """Return a config of nested dicts and lists as a TOML file."""
    blocks = _blocks("", table, None)
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _settings(
    table: Table,
    origins: dict[str, str],
    words: Sequence[str],
    name: str,
    text: str,
    known_links: Mapping[str, str],
) -> Settings:
    """Put words on top of a table, fill in what it leaves out, and check it."""
    preset = rl_stage_of(table.get("recipe"))
    for word in words:
        key, value = assignment(word)
        origins = {k: v for k, v in origins.items() if k != key and not k.startswith(key + ".")}
        if value == NONE and may_be_left_out(key.split(".")):
            remove_value(table, key)
            continue
        set_value(table, key, value)
        origins |= {k: "command line" for k, _ in leaves(value, key)}
    replace_created_policy(table, origins)
    notes = replace_preset(table, origins, preset) + replace_trained_reward(table, origins)
    replace_length(table, origins)
    written = dict(origins)
    _expand(table, origins)
    links = resolve_links(table, known_links)
    config = _validate(table, origins)
    _refuse_unread(config, written)
    return Settings(config, origins, name, text, links, notes)


def _refuse_unread(config: Config, written: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a setting that no stage reads. Where the recipe was changed on the
    command line, tables of stages that were left out may stay, and what the file has of them in
    other tables; a word on the command line such as data.sampling or run.steps may not."""
    is_cut = written.get("recipe") == "command line"
    for key, origin in written.items():
        if is_cut and (origin != "command line" or roles_that_read(key.partition(".")[0])):
            continue
        if not config.reads(key):
            raise ConfigError(
                f"{origin}: {key}: no stage of this recipe reads it ({', '.join(config.recipe)}). "
                f"Take it out."
            )


def resolved_toml(settings: Settings) -> str:
    """Return all settings that the recipe reads as a TOML file that gives the same run again. A
    comment behind each value names its origin."""
    config, table = settings.config, json_ready(settings.config)
    led = {
        key: f'{settings.origins.get(key, "default")}: "{written}" then'
        for key, (written, _) in settings.links.items()
    }
    for name, inner in list(table.items()):
        if isinstance(inner, dict):
            table[name] = {
                key: value for key, value in inner.items() if config.reads(f"{name}.{key}")
            }
        elif not config.reads(name):
            del table[name]
    blocks = list(_blocks("", table, {**settings.origins, **led}))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def preset_toml(preset: Algorithm | PreferenceLoss) -> str:
    """Return a preset as tables of a run's file, which give the same algorithm even if the preset
    changes later."""
    record = without_none(dataclasses.asdict(preset))
    table = (
        {"algorithm": record} if isinstance(preset, Algorithm) else {"preference": {"loss": record}}
    )
    return table_toml(table)


def _blocks(
    name: str, table: Table, origins: Mapping[str, str] | None, header: str = ""
) -> Iterator[list[str]]:
    """Yield a table as a block of lines, then each table inside it as a block."""
    prefix = f"{name}." if name else ""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lists = {
        key: value
        for key, value in table.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    lines = [
        f"{key} = {toml_value(value)}"
        + (f"  # {origins.get(prefix + key, 'default')}" if origins is not None else "")
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


# --- reading


def _line_numbers(text: str) -> dict[str, int]:
    """Return the line number of each table, and of each key that starts a line, by dotted key."""
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
    """Return the line of a key, or of the innermost table around it that has a line."""
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a table with their dotted keys."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = iter(enumerate(value))
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def assignment(word: str) -> tuple[str, Any]:
    """Return the key and the value of a `key=value` word. Raises `ConfigError`."""
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+|\w[\w-]*(\.\w[\w-]*)*", key):
        raise ConfigError(
            f'"{word}": not understood. Settings are written key=value, such as optim.lr=1e-5.'
        )
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text  # text without quotes, as shells leave it


def set_value(table: Table, key: str, value: Any) -> None:
    """Set a dotted key of a table. Raises `ConfigError` where a value is in the way."""
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
        raise ConfigError(
            f"{key}: name one of the list by its number, such as {'.'.join(path)}.0.{last}."
        )
    here[last] = value


def remove_value(table: Table, key: str) -> None:
    """Remove a dotted key of a table, where it is there."""
    *path, last = key.split(".")
    here: Any = table
    for name in path:
        if isinstance(here, list) and name.isdigit() and int(name) < len(here):
            here = here[int(name)]
        else:
            here = here.get(name) if isinstance(here, dict) else None
    if isinstance(here, dict):
        here.pop(last, None)


def _expand(table: Table, origins: dict[str, str]) -> None:
    """Fill in what a file may leave out: the type of the critic, the parts of the presets, and the
    reward model that the recipe trains."""
    stages = table.get("recipe", [])
    if isinstance(stages, str):
        stages = table["recipe"] = [stages]
    if isinstance(table.get("critic"), dict):
        table["critic"] = {"type": "separate", **table["critic"]}
    _expand_preference(table, stages, origins)
    algorithm = table.get("algorithm", {})
    if not isinstance(algorithm, dict):
        raise ConfigError("algorithm: is a table. Write [algorithm] and its keys below.")
    rl = rl_stage_of(stages)
    if rl is None:
        _refuse_algorithm(algorithm, stages, origins)
        table.pop("algorithm", None)
        return
    _expand_algorithm(table, algorithm, rl, origins)
    if "reward" not in table and "reward_model" in stages:
        table["reward"] = [{"type": "ensemble" if _has_members(table) else "model"}]
        origins["reward.0.type"] = "recipe"


def _expand_preference(table: Table, stages: Any, origins: dict[str, str]) -> None:
    """Put the loss of the recipe's preference stage below what the file says of it."""
    names = stages if isinstance(stages, list) else []
    stage = next((s for s in names if isinstance(s, str) and s in PREFERENCES), None)
    if stage is not None and isinstance(table.setdefault("preference", {}), dict):
        below = dataclasses.asdict(PREFERENCES[stage])
        above = table["preference"].get("loss", {})
        table["preference"]["loss"] = _merged({"loss": below}, {"loss": above})["loss"]
        for key, _ in leaves(table["preference"]["loss"], "preference.loss"):
            origins.setdefault(key, f"preset {stage}")
    elif isinstance(table.get("preference"), dict) and isinstance(
        table["preference"].get("loss"), dict
    ):
        table["preference"]["loss"] = {"type": "dpo", **table["preference"]["loss"]}


def _refuse_algorithm(algorithm: Table, stages: Any, origins: dict[str, str]) -> None:
    """Raise `ConfigError` where a file has a table [algorithm] and its recipe no RL stage. Where
    the recipe was cut on the command line the table may stay; of a stage that is unknown the config
    says more."""
    if not algorithm or origins.get("recipe") == "command line":
        return
    known = {stage for kind in KINDS for stage in kind.stages}
    if isinstance(stages, list) and known.issuperset(map(str, stages)):
        place = origins.get("algorithm.preset") or where("algorithm", origins)
        raise ConfigError(
            f"{place}: algorithm: the recipe ({', '.join(stages)}) has no RL stage that would "
            f"read it."
        )


def _expand_algorithm(table: Table, algorithm: Table, rl: str, origins: dict[str, str]) -> None:
    """Put the preset of the RL stage below what the file says of the algorithm."""
    name = algorithm.pop("preset", rl)
    origin = origins.pop("algorithm.preset", None)
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ConfigError(
            f"{origin}: algorithm.preset = {toml_value(name)}: no such "
            f"preset.{did_you_mean(name, ALGORITHMS)} "
            "`quartet algorithms` lists them."
        )
    if name != rl:
        raise ConfigError(
            f'{origin}: algorithm.preset = "{name}", but the recipe says "{rl}". Make them the '
            f"same."
        )
    preset = without_none(dataclasses.asdict(ALGORITHMS[rl]))
    table["algorithm"] = _merged(preset, algorithm)
    _correct_for_servers(table, algorithm, origins)
    for key, _ in leaves(table["algorithm"], "algorithm"):
        origins.setdefault(key, f"preset {rl}" if _has(preset, key.split(".")[1:]) else "default")


def _has_members(table: Table) -> bool:
    """Return whether the run trains several reward models."""
    settings = table.get("reward_model")
    members = settings.get("members", 1) if isinstance(settings, dict) else 1
    return isinstance(members, int) and members > 1


def _is_served(table: Table) -> bool:
    """Return whether the responses come from servers."""
    generator = table.get("generator")
    name = generator.get("type") if isinstance(generator, dict) else None
    return isinstance(name, str) and issubclass(GeneratorSource.members.get(name, object), Servers)


def _correct_for_servers(table: Table, written: Table, origins: dict[str, str]) -> None:
    """Where the responses come from servers, give the algorithm the correction for another engine,
    below what is `written` of it."""
    if not _is_served(table):
        return
    algorithm = table["algorithm"]
    loss = algorithm["policy_loss"]
    named = loss if isinstance(loss, dict) else {}
    is_product = named.get("ratio") == "product"
    default = for_another_engine(named.get("type", ""), "product" if is_product else None)
    below = {"correction": dataclasses.asdict(default)}
    above = {key: value for key, value in written.items() if key == "correction"}
    algorithm |= _merged(below, above)
    for key, _ in leaves(algorithm["correction"], "algorithm.correction"):
        origins.setdefault(key, FOR_SERVERS)


def _has(table: Any, path: list[str]) -> bool:
    if isinstance(table, list) and path and path[0].isdigit():
        return int(path[0]) < len(table) and _has(table[int(path[0])], path[1:])
    return not path or (
        isinstance(table, dict) and path[0] in table and _has(table[path[0]], path[1:])
    )


def _merged(below: Table, above: Table) -> Table:
    """Return `below` with the keys of `above` replaced. A table of another type replaces the whole
    table; the key `scores.0` names the first table of the list `scores`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if (
            isinstance(old, list)
            and isinstance(value, dict)
            and value
            and all(k.isdigit() for k in value)
        ):
            if beyond := [k for k in value if int(k) >= len(old)]:
                raise ConfigError(
                    f"algorithm.{key}.{beyond[0]}: {key} has {len(old)} parts, counted from 0."
                )
            merged[key] = [_merged(item, value.get(str(i), {})) for i, item in enumerate(old)]
            continue
        same = (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("type", old.get("type")) == old.get("type")
        )
        if same and old:
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged


def _validate(table: Table, origins: Mapping[str, str]) -> Config:
    try:
        return TypeAdapter(Config).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(sentence(min(error.errors(), key=_rank), table, origins)) from None


def _rank(error: ErrorDetails) -> int:
    """Return the place of an error among those of a config: unknown keys come first, and of a text
    that could be a word or a table, what is said of the word."""
    if error["type"] == "unexpected_keyword_argument":
        return 0
    return 1 if error["type"] == "literal_error" and isinstance(error["input"], str) else 2
