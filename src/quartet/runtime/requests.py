"""From what a user names, a recipe, a TOML file or a run's folder, to the settings of a run."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from quartet import __version__, files
from quartet.config.links import absolute_word, relative_paths
from quartet.config.tables import json_ready
from quartet.config.toml import FOR_SERVERS, ConfigError, Settings, read_settings
from quartet.io.texts import did_you_mean, excerpt, typed
from quartet.recipes import recipe_names, recipe_path, template_path
from quartet.runs.folders import find_run
from quartet.stages.kinds import kind_of

DEFAULT = "reviews"
"""The recipe that is run if none is named."""


@dataclass(frozen=True)
class ResumeRequest:
    """A run that is to be resumed."""

    path: Path | None
    """Its folder; None if there is no run of this name yet."""
    settings: Settings
    notes: list[str] = field(default_factory=list)
    """Sentences about where its files are looked for, and about defaults that it does not take
    over."""


def settings_of(
    what: str, words: Sequence[str] = (), known_links: Mapping[str, str] = MappingProxyType({})
) -> Settings:
    """Return the settings of a recipe or a TOML file with `key=value` words on top.

    `known_links` says where paths led when a run began that is to be resumed. Raises `ConfigError`
    if there is no such recipe or file, or the settings cannot work.
    """
    if files.exists(Path(what) / "events.jsonl"):
        raise ConfigError(
            f"{what}: is a run's folder. To go on with it: quartet run {typed(what)} --resume"
        )
    if "=" in what and not files.exists(what):  # quartet run seed=1: the default recipe
        what, words = DEFAULT, [what, *words]
    path = recipe_path(what)
    if path is None and kind_of(what) is not None:
        raise ConfigError(_about_stage(what))
    if path is None and not what.endswith(".toml"):
        raise ConfigError(
            f'"{what}": no such recipe, and not a .toml file.{did_you_mean(what, recipe_names())} '
            f"Recipes are {', '.join(recipe_names())}."
        )
    shown = f"recipe {what}" if path else None
    return read_settings(path or Path(what), words, shown, known_links)


def _about_stage(stage: str) -> str:
    """Return what to do for a user who names a stage where a recipe or a file is named."""
    if template_path(stage) is None:
        return f'"{stage}": is a stage. Write a file with recipe = "{stage}", and name the file.'
    return f'"{stage}": is a stage. quartet init {stage} writes a file for it; name the file.'


def run_to_resume(what: str | None, words: Sequence[str] = ()) -> ResumeRequest:
    """Return the run that `what` names: its folder, or a recipe or file whose newest run is meant;
    None is the latest run.

    Raises `ConfigError` if there is none, or its config is missing or cannot work any more.
    """
    from quartet.recording.run_folder import beginning_of  # imports torch

    if what is not None and "=" in what and not files.exists(what):
        words, what = [what, *words], None
    folder = Path(what or "runs/latest")
    if files.exists(folder / "events.jsonl"):
        if not (folder / "config.resolved.toml").is_file():
            raise ConfigError(
                f"{folder}: has no config.resolved.toml, so it is not known what to go on with."
            )
        return _run_in(folder, words)
    if what is None:
        raise ConfigError(
            "runs/latest: there is no run to resume. Name one: quartet run runs/… --resume"
        )
    if recipe_path(what) is None and not what.endswith(".toml"):
        near = did_you_mean(what, recipe_names())
        reason = "is no run's folder" if folder.is_dir() else "no such run folder"
        raise ConfigError(
            f"{what}: {reason}, and no recipe.{near} `quartet runs` lists the runs in runs/."
        )
    settings = settings_of(what, words)
    run = settings.config.run
    path = find_run(Path(run.folder), run.name or settings.name)
    notes: list[str] = []
    if path is not None:
        links = beginning_of(path).links  # `runs/latest` has moved since, to this run too
        if _began_uncorrected(path, settings):
            words = [*words, 'algorithm.correction={type="none"}']
            notes.append(
                'the run began with algorithm.correction = { type = "none" } and keeps it; runs '
                "with servers that begin now have a correction"
            )
        settings = settings_of(what, words, links)
    return ResumeRequest(path, settings, notes)


def _began_uncorrected(folder: Path, settings: Settings) -> bool:
    """Return whether the settings have the correction that is the default with servers, and the run
    in the folder began without one, as all did before it was the default."""
    if settings.origins.get("algorithm.correction.type") != FOR_SERVERS:
        return False
    try:
        began = tomllib.loads((folder / "config.resolved.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is not known; the checkpoint is compared in any case
        return False
    algorithm = began.get("algorithm")
    correction = algorithm.get("correction") if isinstance(algorithm, dict) else None
    return correction == {"type": "none"}


def _run_in(folder: Path, words: Sequence[str]) -> ResumeRequest:
    """Return the run in a folder, with words on top of its config. If the config names files that
    are not here but where the run was started, that becomes the working directory."""
    from quartet.recording.run_folder import beginning_of

    config, began = folder / "config.resolved.toml", beginning_of(folder)
    try:
        settings = settings_of(str(config), words, began.links)
    except ConfigError as error:
        if began.version is None or began.version == __version__:
            raise
        raise ConfigError(
            f"{error} The run was made by Quartet {excerpt(began.version, 20)}, and this is "
            f"{__version__}."
        ) from None
    path = folder.resolve()
    if began.folder is None or began.folder == Path.cwd():
        return ResumeRequest(path, settings)
    notes = [f"the run was started in {began.folder}"]
    paths = relative_paths(json_ready(settings.config))
    away = [p for p in paths if not p.exists() and (began.folder / p).exists()]
    if not away:
        return ResumeRequest(path, settings, notes)
    notes.append(f"{away[0]} is not here but there: paths are taken from there")
    words = [absolute_word(word) for word in words]
    config = config.resolve()
    os.chdir(began.folder)
    return ResumeRequest(path, settings_of(str(config), words, began.links), notes)
