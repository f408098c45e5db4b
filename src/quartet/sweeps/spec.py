"""The [sweep] table of a file: what is searched, how, and what is best."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from quartet.config.errors import sentence, toml_value, where
from quartet.config.suggestions import description_of
from quartet.config.toml import ConfigError
from quartet.io.texts import did_you_mean
from quartet.parts import Field, part
from quartet.runs.rules import RULES

Method = Literal["grid", "random", "tpe"]
LEAF = {"values", "min", "max", "log", "set"}
"""The names in the table of a searched key; other tables below [sweep.keys] are parts of keys."""
RESERVED = {"seed": "sweep.seeds", "run.name": "quartet sweep", "run.folder": "quartet sweep"}
"""Keys of a run that a sweep sets itself, each with what sets it."""


@part
class Prune:
    """Optuna's median pruner: a trial stops whose best value so far is worse than the median of the
    values that the trials before it had at the same step."""

    startup: int = Field(default=5, ge=1, description="Trials that must end before any is pruned.")
    warmup: int = Field(default=0, ge=0, description="Steps of a run in which it is not pruned.")


@part
class RayRuns:
    """Runs as Ray actors, on the machines of a cluster."""

    address: str | None = Field(
        default=None,
        description='The address of a Ray cluster, or "auto". Left out, Ray is started on this '
        "machine.",
    )
    cpus: int = Field(default=1, ge=1, description="CPUs, and threads, of each run.")
    gpus: float = Field(default=0, ge=0, description="GPUs of each run; it sees no others.")


@part
class SearchedKey:
    """One searched key: the values that it takes, or the range that they are drawn from."""

    values: tuple[Any, ...] | None = Field(default=None, description="The values to try.")
    min: float | int | None = Field(default=None, description="The smallest value of the range.")
    max: float | int | None = Field(default=None, description="The largest value of the range.")
    log: bool = Field(default=False, description="Draw the logarithm of the value evenly.")
    set: tuple[str, ...] = Field(
        default=(), description="The settings that get the value. Left out, the key itself."
    )

    @property
    def is_integer(self) -> bool:
        """Whether the range is of whole numbers: both of its bounds are written as such."""
        return isinstance(self.min, int) and isinstance(self.max, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values of a list, the bounds of a range."""
        return self.values if self.values is not None else (self.min, self.max)

    def problem(self) -> str | None:
        """Return what is wrong with the values, without the key; None if nothing is."""
        if self.values is not None:
            if self.min is not None or self.max is not None or self.log:
                return "has values and a range. Give one of the two."
            if not self.values:
                return "has no values. List those to try, or give min and max."
            texts = [toml_value(value) for value in self.values]
            again = next((text for text in texts if texts.count(text) > 1), None)
            return again and f"lists {again} twice. Take one out."
        if self.min is None or self.max is None:
            return "needs values, or min and max."
        if not (math.isfinite(self.min) and math.isfinite(self.max)):
            return "has a bound that is not finite."
        if self.min >= self.max:
            return (
                f"min = {self.min:g} is not below max = {self.max:g}: the range is empty. Swap "
                "them, or list values."
            )
        if self.log and self.min <= 0:
            return f"min = {self.min:g}: must be > 0, because the range is logarithmic."
        return None


@part
class SweepSpec:
    """Which settings are tried, how often, and by what they are compared."""

    objective: str = Field(
        description='By what trials are compared: "gold", "held_out_reward" or "win_rate" of the '
        "evaluation, or a metric by its name, as the mean of its last 5 values.",
    )
    keys: dict[str, SearchedKey] = Field(
        description="The searched keys, with their values or the range that they are drawn from."
    )
    method: Method = Field(
        default="grid",
        description='How settings are chosen. "grid": every combination; "random"; or "tpe": '
        "Bayesian search by optuna.",
    )
    direction: Literal["maximize", "minimize"] = Field(
        default="maximize", description="Whether more or less of the objective is better."
    )
    trials: int | None = Field(
        default=None, ge=1, description="How many settings are tried; a grid tries all of them."
    )
    seeds: int | tuple[int, ...] = Field(
        default=1, description="How many seeds each setting is run with, or a list of them."
    )
    at_most: dict[str, float] = Field(
        default_factory=dict,
        description='Bounds that the best setting must keep, such as { held_out_kl = 6.0 }. "kl" '
        "and other metrics are means of their last 5 values.",
    )
    parallel: int = Field(
        default=1, ge=1, description="How many runs are under way at once, in processes."
    )
    ray: RayRuns | None = Field(
        default=None,
        description="Start the runs as Ray actors, on the machines of a cluster. Left out, they "
        "are processes of this machine.",
    )
    once: tuple[str, ...] = Field(
        default=(),
        description="Stages at the start of the recipe that run once; all trials start from what "
        "they leave.",
    )
    prune: Prune | None = Field(
        default=None, description="Stop trials that are worse than the median so far (optuna)."
    )
    stop_on: tuple[str, ...] = Field(
        default=(),
        description="Rules of the doctor that prune a trial, beside those that stop any run.",
    )

    def seeds_from(self, first: int) -> tuple[int, ...]:
        """Return the seeds of each setting: those listed, or as many from `first` on."""
        return (
            tuple(range(first, first + self.seeds)) if isinstance(self.seeds, int) else self.seeds
        )

    @property
    def num_trials(self) -> int:
        """The number of settings that are tried."""
        if self.method == "grid":
            return math.prod(len(key.values or ()) for key in self.keys.values())
        return self.trials or 0

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of the values, the last key varying fastest."""
        names = list(self.keys)
        for values in itertools.product(*(key.values or () for key in self.keys.values())):
            yield dict(zip(names, values, strict=True))

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run's settings that a trial's values mean, by dotted key."""
        return {
            setting: value
            for name, value in values.items()
            for setting in self.keys[name].set or (name,)
        }


@dataclass(frozen=True)
class TableOrigin:
    """Where the table stands: the file's origins, for messages."""

    origins: Mapping[str, str]

    def error(self, key: str, words: str) -> ConfigError:
        """Return the error of a key of the [sweep] table."""
        return ConfigError(f"{where(key, self.origins)}: {key}{words}")


def spec_of(table: Any, origins: Mapping[str, str]) -> SweepSpec:
    """Return the checked [sweep] table of a file. `origins` says where each of its values is, by
    dotted key. Raises `ConfigError`."""
    place = TableOrigin(origins)
    if not isinstance(table, dict):
        raise place.error("sweep", ": is a table. Write [sweep] and its keys below.")
    table = {**table, "keys": _searched(table.get("keys"), place, "")}
    _refuse_unknown(table, place)
    try:
        spec = TypeAdapter(SweepSpec).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error, table, origins)) from None
    for problem in _problems(spec):
        raise place.error(*problem)
    return spec


def _searched(value: Any, place: TableOrigin, prefix: str) -> dict[str, Any]:
    """Return the tables of the searched keys by dotted key. `a.b = [1]` without quotes is a table
    in a table in TOML and means the same as `"a.b" = [1]`."""
    if not isinstance(value, dict) or not value:
        raise place.error(
            "sweep.keys",
            ': names nothing to search. Write [sweep.keys] and below it, such as "optim.lr" = '
            "[1e-5, 1e-4].",
        )
    found: dict[str, Any] = {}
    for last, inner in value.items():
        name = prefix + last
        if isinstance(inner, list):
            found[name] = {"values": inner}
        elif isinstance(inner, dict) and (not inner or LEAF & inner.keys()):
            found[name] = inner
        elif isinstance(inner, dict):
            found |= _searched(inner, place, f"{name}.")
        else:
            raise place.error(
                f"sweep.keys.{name}",
                f" = {toml_value(inner)}: is one value. List several, such as [1, 2], or give "
                "{ min = …, max = … }.",
            )
    return found


def _refuse_unknown(table: Mapping[str, Any], place: TableOrigin) -> None:
    """Raise for a name that is none of the table, with the nearest one."""
    for prefix, names, kind in (
        ("sweep", table, SweepSpec),
        ("sweep.prune", table.get("prune"), Prune),
        ("sweep.ray", table.get("ray"), RayRuns),
        *((f"sweep.keys.{name}", inner, SearchedKey) for name, inner in table["keys"].items()),
    ):
        known = [field.name for field in fields(kind)]
        for name in names if isinstance(names, dict) else ():
            if name not in known:
                listed = f" Known are {', '.join(known)}."
                near = did_you_mean(name, known) or listed
                raise place.error(f"{prefix}.{name}", f": no such key.{near}")


def _sentence(error: ValidationError, table: dict[str, Any], origins: Mapping[str, str]) -> str:
    """Return the sentence of a value of a wrong type or outside of its range."""
    first = error.errors()[0]
    place: Any = ("sweep", *first["loc"])

    def describe(path: Sequence[str]) -> str:
        return description_of(path[1:], SweepSpec)

    return sentence({**first, "loc": place}, {"sweep": table}, origins, describe)


def _problems(spec: SweepSpec) -> Iterator[tuple[str, str]]:
    """Yield what cannot work: the key that the sentence is about, and the rest of the sentence."""
    for name, key in spec.keys.items():
        dotted = f"sweep.keys.{name}"
        if (problem := key.problem()) is not None:
            yield dotted, f": {problem}"
        if spec.method == "grid" and key.values is None:
            yield dotted, ': a grid needs values. List them, or set sweep.method = "random".'
    if spec.method == "grid" and spec.trials is not None:
        yield (
            "sweep.trials",
            f" = {spec.trials}: a grid tries all {spec.num_trials:,} combinations. Take it out.",
        )
    if spec.method != "grid" and spec.trials is None:
        yield "sweep.method", f' = "{spec.method}": needs sweep.trials, how many settings to try.'
    settings = [name for key, inner in spec.keys.items() for name in inner.set or (key,)]
    for name in settings:
        if name in RESERVED:
            yield "sweep.keys", f": {name} cannot be searched; {RESERVED[name]} sets it."
        if settings.count(name) > 1:
            yield "sweep.keys", f": {name} is set by two of them. Take one out."
    seeds = spec.seeds
    if isinstance(seeds, int) and seeds < 1:
        yield "sweep.seeds", f" = {seeds}: must be ≥ 1."
    if not isinstance(seeds, int) and (not seeds or len(set(seeds)) < len(seeds)):
        yield "sweep.seeds", ": list at least one seed, and each once."
    yield from _unknown_rules(spec.stop_on)


def _unknown_rules(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    known = [rule.__name__ for rule in RULES]
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or " docs/doctor.md lists them."
            yield "sweep.stop_on", f': "{name}" is no rule of the doctor.{near}'
