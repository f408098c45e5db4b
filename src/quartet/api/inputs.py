"""From the arguments of `quartet.train` to the tables of a config.

A config is text, so that it recreates a run. Rows and models that are given as Python objects are
therefore written to files first, which the config names; rewards that are given as objects are
named in the config and kept in memory (`rewards/objects.py`).
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet import files
from quartet.api.policy_object import check_is_its_folder, check_whole, store_model
from quartet.config.data import Data
from quartet.config.errors import Table, in_short
from quartet.config.tables import without_none
from quartet.config.toml import ConfigError, leaves, read_toml
from quartet.data import DataError
from quartet.files import fingerprint
from quartet.io.texts import did_you_mean, type_in_words, well_formed_json
from quartet.recipes import recipe_path
from quartet.rewards.objects import object_name
from quartet.rewards.source import RewardSource
from quartet.stages.kinds import kind_of

STORE = "inputs"
"""The folder, beside the runs, of rows and models that were given as objects. Their names hold
their checksums, so equal ones are stored once."""
ROWS = ("data.train", "data.eval", "data.pretraining", "sft.data", "reward_model.data")
ROW_KEYS = (*ROWS, "preference.data")
"""The settings that name a file of rows; here they may be rows."""
VERIFIERS = frozenset({"exact", "number", "math", "code", "gold", "environment"})
"""The rewards that may be given by their type alone."""
DATA_KEYS = frozenset(field.name for field in dataclasses.fields(Data))
POLICIES = ("policy", "sft")
"""The folders of a run that hold a trained policy, the last stage's first."""
OF_OTHER_LIBRARIES = {
    **dict.fromkeys(("model", "actor"), "policy"),
    **dict.fromkeys(("reward_fn", "reward_func", "reward_funcs", "reward_function"), "reward"),
    **dict.fromkeys(("dataset", "train_dataset"), "data"),
    **dict.fromkeys(("eval_dataset", "data.test", "data.validation"), "eval_data"),
    "processing_class": "tokenizer",
}
"""What other libraries call arguments of `quartet.train`."""
NO_CALLBACKS = "there are no callbacks. A run is iterated over: for step in run: …"


@dataclass
class Inputs:
    """A config as tables, and the rewards that it names but cannot hold."""

    table: Table
    name: str
    objects: dict[str, Any] = field(default_factory=dict)


def inputs_of(
    recipe: str | Sequence[str],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Inputs:
    """Return the config that arguments and settings describe.

    `arguments` are those of `quartet.train` that are not None, `settings` tables or dotted keys of
    the config. Raises `ConfigError` for what cannot be one.
    """
    table, name = _recipe(recipe)
    if _names_a_model(arguments.get("policy")) and isinstance(table.get("policy"), dict):
        for key in ("create", "tokenizer"):  # as --model does
            table["policy"].pop(key, None)
    inputs = Inputs(table, arguments.get("name") or name)
    for key, value in settings.items():
        _check_argument(key)
        if value is not None:
            put(table, key, plain(value))
    for key, value in _shortcuts(arguments, table):
        put(table, key, plain(value))
    if "reward" in arguments:
        table["reward"] = _rewards(arguments["reward"], inputs.objects)
    runs = Path(get(table, "run.folder") or "runs")
    if "policy" in arguments:
        trains = any(kind.optim for kind in map(kind_of, table["recipe"]) if kind is not None)
        is_whole = not get(table, "policy.adapter")  # an adapter trains its own weights alone
        tokenizer = arguments.get("tokenizer")
        policy = policy_table(arguments["policy"], tokenizer, runs, trains and is_whole)
        put(table, "policy", policy)
    elif "tokenizer" in arguments:
        put(table, "policy.tokenizer", _path(arguments["tokenizer"], "tokenizer"))
    for key in ROW_KEYS:
        rows = get(table, key)
        if rows is not None and not _is_file_setting(rows):
            put(table, key, str(store_rows(rows, key, runs / STORE)))
    check_plain(table)
    return inputs


def _names_a_model(policy: Any) -> bool:
    """Whether the argument `policy` takes the place of a model that a recipe creates."""
    return policy is not None and not (isinstance(policy, Mapping) and "model" not in policy)


def _check_argument(key: str) -> None:
    """Raise `ConfigError` for an argument as another library calls it."""
    if key in OF_OTHER_LIBRARIES:
        raise ConfigError(f"{key}: no such argument. Did you mean {OF_OTHER_LIBRARIES[key]}?")
    if key in {"callback", "callbacks"}:
        raise ConfigError(f"{key}: {NO_CALLBACKS}")


def check_plain(table: Table) -> None:
    """Raise `ConfigError` for a value that no file can hold."""
    for key, value in leaves(table):
        _check_argument(key)
        _check_plain(key, value)


def _check_plain(key: str, value: Any) -> None:
    """Raise `ConfigError` for a value that no file can hold."""
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, str | int | float | dict | list | tuple):
            raise ConfigError(
                f"{key}: {type_in_words(item)} is no setting. Give a number, a text, a list, a "
                'table, or an instance of a part; a function by its name, "file.py:name".'
            )


def _recipe(recipe: str | Sequence[str]) -> tuple[Table, str]:
    """Return the tables that a recipe begins with and its name: a stage or several, a recipe of the
    package, or a TOML file."""
    if not isinstance(recipe, str | list | tuple):
        raise ConfigError(
            f'recipe: {type_in_words(recipe)} is no stage. Give a name, such as "ppo".'
        )
    stages = [recipe] if isinstance(recipe, str) else list(recipe)
    if all(kind_of(stage) is not None for stage in stages):
        return {"recipe": stages}, "-".join(stages)
    if not isinstance(recipe, str):
        return {"recipe": stages}, "run"  # the config says which stage there is not
    path = recipe_path(recipe) or (Path(recipe) if recipe.endswith(".toml") else None)
    if path is None:
        return {"recipe": stages}, "run"
    return dict(read_toml(path, recipe).table), path.stem


def _shortcuts(arguments: Mapping[str, Any], table: Table) -> Iterable[tuple[str, Any]]:
    """Yield the settings that short arguments stand for."""
    if "data" in arguments:
        data = arguments["data"]
        is_table = isinstance(data, Mapping)
        if is_table and any(isinstance(v, list) for k, v in data.items() if k not in DATA_KEYS):
            raise ConfigError(
                "data: a dict of columns is no data. Give a list with a dict for each row, or "
                "datasets.Dataset.from_dict(…)."
            )
        yield ("data", data) if is_table else ("data.train", _rows("data", data))
    if "eval_data" in arguments:
        yield "data.eval", _rows("eval_data", arguments["eval_data"])
    if "folder" in arguments:
        yield "run.folder", str(arguments["folder"])
    if "name" in arguments:
        yield "run.name", arguments["name"]
    if "seed" in arguments:
        yield "seed", arguments["seed"]
    if "steps" in arguments:
        stages = table.get("recipe", [])
        kinds = [kind_of(str(s)) for s in ([stages] if isinstance(stages, str) else stages)]
        keys = [kind.steps for kind in kinds if kind is not None and kind.steps is not None]
        if not keys and all(kinds):  # of unknown stages the config says more
            raise ConfigError("steps: no stage of this recipe has a number of steps.")
        if keys:
            yield keys[-1], arguments["steps"]


def _rows(name: str, data: Any) -> Any:
    if isinstance(data, str) and len(data.split()) > 1 and not files.exists(data):
        raise ConfigError(
            f"{name}: {in_short(data, 60)}: no such file. Texts are given in a list: [text]."
        )
    return str(data) if isinstance(data, Path) else data


def put(table: Table, key: str, value: Any) -> None:
    """Set a dotted key; a dict is merged into the table that is there."""
    *path, last = key.split(".")
    for name in path:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {name} is a value, not a table.")
        table = inner
    if isinstance(value, dict) and isinstance(table.get(last), dict):
        for name, item in value.items():
            put(table[last], name, item)
    else:
        table[last] = value


def get(table: Table, key: str) -> Any:
    """Return the value of a dotted key, None if it is not set."""
    value: Any = table
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def plain(value: Any) -> Any:
    """Return a value as TOML has it: parts become tables, paths text, numbers and arrays of numpy
    and torch plain numbers and lists. Rows stay as they are."""
    if isinstance(value, type):
        raise ConfigError(f"{value.__name__}: is a class. Give an instance: {value.__name__}().")
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return without_none(dataclasses.asdict(value))
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        is_part = dataclasses.is_dataclass
        return [plain(item) if is_part(item) or _is_scalar(item) else item for item in value]
    return value


def _is_scalar(value: Any) -> bool:
    """Whether it is one number, or one text, of numpy or torch."""
    return getattr(value, "ndim", None) == 0 and hasattr(value, "item")


def _is_file_setting(value: Any) -> bool:
    """Whether it is what a file may say: a path, or several paths."""
    if isinstance(value, str):
        return True
    texts = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return texts and bool(value) and all(item and files.exists(item) for item in value)


def store_rows(rows: Any, key: str, store: Path) -> Path:
    """Write rows as a JSONL file and return its path: a list of prompts, each a text or a list of
    messages, or of dicts; a `datasets.Dataset`; a pandas frame."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a pandas DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping | Set) or not isinstance(rows, Iterable):  # a set has no order
        raise ConfigError(
            f"{key}: {type_in_words(rows)} is no data. Give a path, or a list of prompts or dicts."
        )
    lines = []
    for number, row in enumerate(rows, 1):
        record = {"prompt": row} if isinstance(row, str) or _is_conversation(row) else row
        if not isinstance(record, Mapping):
            raise ConfigError(f"{key}, row {number}: {type_in_words(row)} is no text and no dict.")
        try:
            lines.append(json.dumps(well_formed_json(dict(record)), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}, row {number}: cannot be written as JSON: {error}.") from None
    if not lines:
        raise ConfigError(f"{key}: is empty. Give at least one row.")
    store.mkdir(parents=True, exist_ok=True)
    beside = store / f".{key}.jsonl"
    files.replace(beside, "".join(lines))
    path = store / f"{key}-{fingerprint(beside)['sha256'][:12]}.jsonl"
    beside.replace(path)
    return path


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(m, Mapping) for m in row)


@contextlib.contextmanager
def naming_rows() -> Iterator[None]:
    """Where a `DataError` names a row of a stored file, name the row that the caller gave."""
    stored = rf"(?:\S*/)?({'|'.join(map(re.escape, ROW_KEYS))})-[0-9a-f]{{12}}\.jsonl"
    try:
        yield
    except DataError as error:
        words = re.sub(rf"{stored}:(\d+)", r"\1, row \2", str(error))
        raise DataError(re.sub(stored, r"\1", words)) from None


def policy_table(
    policy: Any, tokenizer: Any, folder: str | Path = "runs", trains: bool = False
) -> Table:
    """Return the [policy] table of a run, a folder or hub id, of such a table, or of a model with
    its tokenizer. `folder` is where run folders are made; `trains` says that all weights of the
    model are to be trained."""
    if isinstance(policy, tuple) and len(policy) == 2 and tokenizer is None:
        policy, tokenizer = policy
    check_whole(policy, trains)
    if hasattr(policy, "save_pretrained"):
        check_is_its_folder(policy)
        if not hasattr(tokenizer, "save_pretrained"):
            raise ConfigError(
                "policy: a model that is loaded already needs its tokenizer: "
                "policy=model, tokenizer=tokenizer."
            )
        return {"model": str(store_model(policy, tokenizer, Path(folder) / STORE))}
    if isinstance(policy, str | os.PathLike):
        table = {"model": _model_of(os.fspath(policy))}
    elif isinstance(policy, Mapping):
        table = dict(plain(policy))
    else:
        raise ConfigError(
            f"policy: {type_in_words(policy)} is no model. Give a folder, a hub id, or a model "
            "of transformers with its tokenizer."
        )
    return table if tokenizer is None else {**table, "tokenizer": _path(tokenizer, "tokenizer")}


def _model_of(folder: str) -> str:
    """Return the folder of the last policy that a run has written; another folder, or a hub id, as
    it is."""
    is_run = files.exists(folder) and (Path(folder) / "events.jsonl").is_file()
    written = [Path(folder) / name for name in POLICIES if is_run]
    return next((str(path) for path in written if path.is_dir()), folder)


def _path(value: Any, name: str) -> Any:
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return plain(value)
    raise ConfigError(
        f"{name}: {type_in_words(value)} is no folder. Give one, or a hub id; an object goes with "
        "a policy that is an object."
    )


def _rewards(given: Any, objects: dict[str, Any]) -> list[Table]:
    """Return the [[reward]] tables of one reward or a list of them, each alone or with its weight:
    `(reward, weight)`. Those that a file cannot hold are put into `objects`."""
    is_pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)
    items = given if isinstance(given, list | tuple) and not is_pair else [given]
    tables = []
    for item in items:
        weighted = isinstance(item, tuple) and len(item) == 2
        reward, weight = item if weighted else (item, None)
        if weighted and not isinstance(weight, int | float):
            raise ConfigError("reward: a pair is (reward, weight), with a number for the weight.")
        table = _reward(reward, objects)
        tables.append(table if weight is None else {**table, "weight": float(weight)})
    return tables


def _reward(reward: Any, objects: dict[str, Any]) -> Table:
    if isinstance(reward, Mapping | RewardSource):
        return dict(plain(reward))
    if isinstance(reward, Path):
        return {"type": "model", "model": str(reward)}
    if isinstance(reward, str):
        if reward in VERIFIERS:
            return {"type": reward}
        if (near := did_you_mean(reward, VERIFIERS)) and not files.exists(reward):
            raise ConfigError(f'reward = "{reward}": no such folder and no such type.{near}')
        place, colon, _ = reward.rpartition(":")
        if colon and place.endswith(".py"):
            return {"type": "function", "function": reward}
        return {"type": "model", "model": reward}
    if isinstance(reward, type):
        raise ConfigError(f"reward: {reward.__name__} is a class. Give an instance.")
    if not callable(reward) and not hasattr(reward, "score"):
        raise ConfigError(
            f"reward: {type_in_words(reward)} is no reward. Give a function, an object with a "
            "method score(rollouts), or a reward model."
        )
    name = object_name(reward)
    first, number = name, 1
    while name in objects:
        number += 1
        name = f"{first}_{number}"
    objects[name] = reward
    return {"type": "object", "object": name}
