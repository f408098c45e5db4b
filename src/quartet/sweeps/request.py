"""From a file and `key=value` words to a checked sweep, and to the words of each of its runs."""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.config.errors import toml_value, where
from quartet.config.suggestions import about_unknown, known_keys
from quartet.config.tables import Config
from quartet.config.toml import (
    ConfigError,
    Settings,
    TomlFile,
    assignment,
    read_toml,
    set_value,
    settings_in,
    table_toml,
)
from quartet.io.texts import did_you_mean
from quartet.recipes import sweep_names, sweep_path
from quartet.runs.definitions import DEFINITIONS, definition
from quartet.runs.sweeps import EVALUATED
from quartet.sweeps.spec import SweepSpec, spec_of
from quartet.sweeps.suggest import require_optuna, suggest

ONCE = "once"
"""The name of the run whose stages all trials start from."""
SHAREABLE = ("sft", "reward_model")
"""Stages that can run once: what they leave can be named in the config of a later run."""
CHECKED = 200
"""Settings of a grid that are checked before it begins; of more, each value is checked once."""


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as it was asked for, checked."""

    name: str
    spec: SweepSpec
    file: TomlFile
    """The run's file, without the [sweep] table."""
    words: tuple[str, ...]
    """The `key=value` words of every run."""
    base: Settings
    """The settings of the run before any searched key is set."""
    text: str
    """The whole file as it was written."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of each setting."""
        return self.spec.seeds_from(self.base.config.seed)

    @property
    def trial_recipe(self) -> tuple[str, ...]:
        """The stages of a trial: those of the recipe that do not run once."""
        return self.base.config.recipe[len(self.spec.once) :]

    @property
    def config_text(self) -> str:
        """The run's file, as TOML."""
        return table_toml(self.file.table)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed sweep must have in common with how it began: all but where and how many
        runs are under way at once, and, where trials are drawn, how many of them there are."""
        spec = dataclasses.asdict(self.spec)
        for key in ("parallel", "trials", "ray"):
            del spec[key]
        whole = {"spec": spec, "config": self.config_text, "words": self.words}
        found: dict[str, Any] = json.loads(json.dumps(whole))
        return found

    def once_words(self) -> list[str]:
        """Return the words of the run whose stages run once: those that they read."""
        once, config = set(self.spec.once), self.base.config
        read = [word for word in self.words if once & {*config.readers(word.partition("=")[0])}]
        return [*read, f"recipe={toml_value(self.spec.once)}"]

    def trial_words(self, values: Mapping[str, Any], seed: int, once: str = ONCE) -> list[str]:
        """Return the words of a trial's run with this seed. `once` is the folder of the run whose
        stages ran once."""
        settings = [f"{k}={toml_value(v)}" for k, v in self.spec.settings(values).items()]
        return [*self.words, *self._start(once), *settings, f"seed={seed}"]

    def _start(self, once: str) -> Iterator[str]:
        """Yield the words that let a run start from what ran once."""
        if not self.spec.once:
            return
        yield f"recipe={toml_value(self.trial_recipe)}"
        if "sft" in self.spec.once:
            yield f"policy.model={toml_value(once + '/sft')}"
        if "reward_model" in self.spec.once:
            model = toml_value(once + "/reward_model")
            if self.base.origins.get("reward.0.type") == "recipe":  # no table names it
                yield f'reward=[{{ type = "model", model = {model} }}]'
                return
            for number, reward in enumerate(self.base.config.reward):
                if reward.type == "model" and getattr(reward, "model", None) is None:
                    yield f"reward.{number}.model={model}"


def request_of(what: str, words: Sequence[str] = ()) -> SweepRequest:
    """Return the sweep that a recipe of `recipes/sweeps` or a TOML file describes, with `key=value`
    words on top; those that begin with `sweep.` are of its [sweep] table.

    Raises `ConfigError` if it cannot work: one sentence that names the file and line.
    """
    path = sweep_path(what)
    if path is None and not what.endswith(".toml"):
        raise ConfigError(
            f'"{what}": no such sweep, and not a .toml file.{did_you_mean(what, sweep_names())} '
            f"Sweeps are {', '.join(sweep_names())}."
        )
    return request_in(read_toml(path or Path(what), f"sweep {what}" if path else None), words)


def request_in(file: TomlFile, words: Sequence[str]) -> SweepRequest:
    """Return the checked sweep of a file's content. Raises `ConfigError`."""
    table, origins = copy.deepcopy(file.table), dict(file.origins)
    if "sweep" not in table:
        place = next(iter(origins.values()), file.name).rpartition(":")[0] or file.name
        raise ConfigError(
            f"{place}: has no [sweep] table. It says what is searched: docs/sweeps.md."
        )
    for word in words:
        key, value = assignment(word)
        if key.startswith("sweep."):
            set_value(table, key, value)
            origins = {k: v for k, v in origins.items() if not f"{k}.".startswith(f"{key}.")}
            origins[key] = "command line"
    spec = spec_of(table.pop("sweep"), origins)
    own = tuple(word for word in words if not word.startswith("sweep."))
    rest = {key: origin for key, origin in origins.items() if not key.startswith("sweep.")}
    without = TomlFile(table, rest, file.name, file.text)
    base = settings_in(without, own)
    request = SweepRequest(file.name, spec, without, own, base, file.text)
    if base.config.run.name is not None:
        place = where("run.name", {**origins, **base.origins})
        raise ConfigError(f"{place}: run.name: a sweep names its runs. Take it out.")
    _check(request, origins)
    require_optuna(spec)
    return request


def _check(request: SweepRequest, origins: Mapping[str, str]) -> None:
    """Raise `ConfigError` for what cannot work."""
    _check_keys(request, origins)
    _check_once(request, origins)
    names = {request.spec.objective: "sweep.objective"}
    for name, key in (names | {n: f"sweep.at_most.{n}" for n in request.spec.at_most}).items():
        if (problem := unrecorded(request.base.config, name)) is not None:
            raise ConfigError(f"{where(key, origins)}: {key}: {problem}")
    for searched, values in _examples(request):
        try:
            settings_in(request.file, request.trial_words(values, request.seeds[0]))
        except ConfigError as error:
            place = where(f"sweep.keys.{searched}" if searched else "sweep", origins)
            raise ConfigError(f"{place}: {str(error).removeprefix('command line: ')}") from None


def _check_keys(request: SweepRequest, origins: Mapping[str, str]) -> None:
    """Raise for a searched key that is no setting, with the nearest one, or that no stage reads."""
    known, config = set(known_keys()), request.base.config
    for name, key in request.spec.keys.items():
        place = where(f"sweep.keys.{name}", origins)
        for setting in key.set or (name,):
            plain = ".".join(part for part in setting.split(".") if not part.isdigit())
            if plain not in known and not known & _parents(plain):
                _, words = about_unknown(setting.split("."), None, request.file.table)
                raise ConfigError(f"{place}: {setting}: {words}")
            if not config.reads(plain):
                stages = ", ".join(config.recipe)
                raise ConfigError(
                    f"{place}: {setting}: no stage of this recipe reads it ({stages}). Take it out."
                )


def _parents(key: str) -> set[str]:
    """Return the tables around a key of which any key is checked when the values are tried: those
    of a part that a user may have written, such as algorithm.policy_loss."""
    parts = key.split(".")
    return {".".join(parts[:i]) for i in range(2, len(parts))}


def _check_once(request: SweepRequest, origins: Mapping[str, str]) -> None:
    """Raise where the stages that are to run once cannot, or read a searched key."""
    once, config = request.spec.once, request.base.config
    place = where("sweep.once", origins)
    if once != config.recipe[: len(once)] or len(once) == len(config.recipe):
        raise ConfigError(
            f"{place}: sweep.once = {toml_value(once)}: are not the first stages of the recipe "
            f"({', '.join(config.recipe)}), with others after them."
        )
    if any(stage not in SHAREABLE for stage in once):
        raise ConfigError(
            f"{place}: sweep.once = {toml_value(once)}: only {' and '.join(SHAREABLE)} can run "
            "once. Leave the others to the trials."
        )
    if "reward_model" in once and len(config.reward_models) > 1:
        raise ConfigError(
            f"{place}: sweep.once: an ensemble (reward_model.members) cannot run once. Train it "
            "before, and name its folders in [[reward]]."
        )
    for name, key in request.spec.keys.items():
        for setting in key.set or (name,):
            plain = ".".join(part for part in setting.split(".") if not part.isdigit())
            readers = [stage for stage in once if stage in config.readers(plain)]
            if readers and set(config.readers(plain)) != set(config.stages):
                raise ConfigError(
                    f"{where(f'sweep.keys.{name}', origins)}: {setting}: is read by {readers[0]}, "
                    "which runs once for all trials. Take the stage out of sweep.once."
                )


def unrecorded(config: Config, name: str) -> str | None:
    """Return a sentence if runs of a config record no measure of this name; None if they may."""
    if name in EVALUATED:
        if "evaluation" not in config.recipe:
            return f'"{name}" comes from the stage evaluation, which the recipe does not have.'
        if name == "gold" and config.data.world is None and not _has_gold(config):
            return "the data have no gold reward. Use held_out_reward or win_rate."
        return None
    own = config.run.metrics
    if definition(name).what or own:
        return None
    names = [*EVALUATED, *(row.name for row in DEFINITIONS if "*" not in row.name)]
    return f'"{name}" is no metric.{did_you_mean(name, names)} docs/metrics.md lists them.'


def _has_gold(config: Config) -> bool:
    return any(getattr(source, "type", "") == "gold" for source in config.reward)


def _examples(request: SweepRequest) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield values that are checked before a sweep begins, each with the key that it is about: each
    value of a list and each bound of a range beside the first ones of the others, and all
    combinations of a small grid."""
    keys = request.spec.keys
    first = {name: key.ends[0] for name, key in keys.items()}
    for name, key in keys.items():
        for value in key.ends:
            yield name, first | {name: value}
    if request.spec.method == "grid" and request.spec.num_trials <= CHECKED:
        for values in request.spec.grid():
            yield None, values
    elif request.spec.method == "random":
        for number in range(min(request.spec.num_trials, CHECKED)):
            yield None, suggest(request.spec, request.base.config.seed, number, ())
