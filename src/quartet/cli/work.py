"""A run from its first event to its last: begun, gone on with, stopped, failed or done."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quartet import __version__
from quartet.cli.common import FAILED, RESUMABLE, complaints, console, refuse, without_progress_bars
from quartet.recipes import recipe_names, recipe_path

if TYPE_CHECKING:
    from quartet.build import Job
    from quartet.observability.run import RunFolder
    from quartet.plan import Plan
    from quartet.resume import Choice
    from quartet.settings import Settings

DEFAULT = "reviews"
AGAIN, MINUTES = "QUARTET_RESTARTED", "QUARTET_MINUTES_LEFT"
"""What a process that starts itself again tells the next: how often that was, and how long it may take."""


def settings_of(what: str, words: list[str]) -> "Settings":
    """A recipe's name or a file, and what is said beside it."""
    from quartet.settings import ConfigError, read_settings

    if (Path(what) / "events.jsonl").is_file():
        refuse(f"{what}: is a run's folder. To go on with it: quartet run {what} --resume")
    if "=" in what and not Path(what).exists():  # quartet run seed=1: the default recipe with a setting
        what, words = DEFAULT, [what, *words]
    path = recipe_path(what)
    shown = f"recipe {what}" if path else None
    if path is None and not what.endswith(".toml"):
        from quartet.config import did_you_mean

        near = did_you_mean(what, recipe_names())
        refuse(f'"{what}": no such recipe, and not a .toml file.{near} Recipes are {", ".join(recipe_names())}.')
    try:
        return read_settings(path or Path(what), words, shown)
    except ConfigError as error:
        refuse(str(error))


def run_to_resume(what: str | None, words: list[str]) -> "tuple[Path | None, Settings]":
    """The run folder, None where there is none of that name yet, and the config to go on with."""
    from quartet.resume import find_run

    if what is not None and "=" in what and not Path(what).exists():
        words = [what, *words]
        what = None
    folder = Path(what or "runs/latest")
    if (folder / "events.jsonl").is_file():
        if not (folder / "config.resolved.toml").is_file():
            refuse(f"{folder}: has no config.resolved.toml, so it is not known what to go on with.")
        return folder.resolve(), settings_of(str(folder / "config.resolved.toml"), words)
    if what is None:
        refuse("runs/latest: there is no run to resume. Name one: quartet run runs/… --resume")
    settings = settings_of(what, words)
    run = settings.config.run
    return find_run(Path(run.folder), run.name or settings.name), settings


def new_run(settings: "Settings", fault: str | None) -> int:
    """A new run. Everything that can be refused is refused before its folder exists."""
    from quartet.observability.run import RunFolder
    from quartet.settings import resolved_toml

    job, config = _build(settings, fault), settings.config
    files = {"config.toml": settings.text, "config.resolved.toml": resolved_toml(settings)}
    try:
        folder = RunFolder.create(Path(config.run.folder), config.run.name or settings.name, files)
    except OSError as error:
        refuse(f'run.folder = "{config.run.folder}": cannot be written ({error.strerror}).')
    return _work(settings, job, folder, fault)


def go_on(path: Path | None, settings: "Settings", fault: str | None, accept: list[str]) -> int:
    """From the newest checkpoint that can be used."""
    from quartet import durable
    from quartet.observability.reader import Run
    from quartet.observability.run import RunFolder
    from quartet.resume import CannotResume, choose, has_begun, set_aside
    from quartet.settings import resolved_toml

    if path is None:
        console.print("There is no run of this name to resume: a new one begins.", soft_wrap=True)
        return new_run(settings, fault)
    try:
        folder = RunFolder(path)
    except OSError as error:
        refuse(str(error) if error.errno is None else f"{path}: cannot be written ({error.strerror}).")
    job = _build(settings, fault)
    choice = None
    if has_begun(path):
        try:
            choice = choose(path, settings.config, job.made_with, accept)
        except CannotResume as error:
            refuse(str(error))
        run = Run(path)
        if run.status == "done" and not choice.skipped:
            console.print(f"{path} is done: {run!r}", soft_wrap=True)
            return 0
        for checkpoint, reason in choice.skipped:
            console.print(f"note   checkpoint {checkpoint.name} was skipped: {reason}", style="yellow", soft_wrap=True)
        set_aside(choice.skipped)
    else:
        console.print(f"{path} had not begun when it stopped: it begins now.", soft_wrap=True)
        folder.cut_back(0, -1)
    durable.replace(path / "config.toml", settings.text)
    durable.replace(path / "config.resolved.toml", resolved_toml(settings))
    return _work(settings, job, folder, fault, choice, [word for key in accept for word in ("--accept", key)])


def _work(
    settings: "Settings",
    job: "Job",
    folder: "RunFolder",
    fault: str | None,
    choice: "Choice | None" = None,
    accept: Sequence[str] = (),
) -> int:
    """From the first event to the last, whatever ends it. `accept`: the words with which a changed setting was."""
    from quartet.config import json_ready
    from quartet.interruption import Interrupted, Interruption
    from quartet.launch.start import crew
    from quartet.observability.screen import Screen, sample_lines
    from quartet.observability.sinks import Tracking
    from quartet.observability.tokens import TokenTexts
    from quartet.pipeline import Finished, Pipeline, StageFailed
    from quartet.worker import WorkerLost

    config = settings.config
    _send_chatter_to(folder.path / "run.log")
    screen, tracking = Screen(console), Tracking(config.run.track, folder.path, json_ready(config))
    interruption = Interruption(float(os.environ.get(MINUTES, "0")) or config.run.max_minutes, screen.notice)
    saving, texts = job.saving(config.run), TokenTexts(job.tokenizer)
    pipeline = Pipeline(job.stages, folder, texts, saving, tracking, interruption, strict=fault is None)
    since = None if choice is None else choice.checkpoint
    if since is not None:
        pipeline.cut_back(since)
    planned = _say_what(settings, job, folder, fault, choice)
    samples: Sequence[Mapping[str, str]] = ()
    began = time.monotonic()
    try:
        with interruption, crew(config, job, folder.path, fault) as group:
            for event in pipeline.run(since, group):
                screen.show(event)
                if isinstance(event, Finished) and event.stage.name == "evaluation":
                    samples = event.summary["samples"]
    except (Interrupted, WorkerLost) as reason:
        screen.close()
        folder.event("interrupted", reason=str(reason))
        again = int(os.environ.get(AGAIN, "0")) + 1
        goes_on = isinstance(reason, WorkerLost) and again <= config.launch.restarts
        _say_stopped(reason, folder.path, goes_on)
        if not goes_on:
            return RESUMABLE
        tracking.close()
        _start_again(folder.path, again, interruption.minutes_left(), [*accept, *(["--break", fault] if fault else [])])
    except (StageFailed, OSError) as error:
        screen.close()
        _say_failed(folder, error)
        return FAILED
    finally:
        tracking.close()
        screen.close()
    planned_to = {"planned_peak_bytes": planned.peak, "planned_seconds": planned.seconds}
    folder.event("done", None, None, peak_bytes=_peak_bytes(), seconds=round(time.monotonic() - began, 1), **planned_to)
    folder.close()
    for line in sample_lines(samples):
        console.print(line, soft_wrap=True)
    _say_where(folder.path, config.run.folder)
    return 0


def _say_stopped(reason: BaseException, path: Path, goes_on: bool) -> None:
    from quartet.interruption import Interrupted

    if isinstance(reason, Interrupted):
        said = f"stopped by {reason}. Nothing is lost"
    else:
        said = f"stopped: {str(reason).rstrip('.')}. The last checkpoint is whole"
    more = "the run goes on from it" if goes_on else f"go on with: quartet run {path} --resume"
    console.print(f"{said}; {more}", soft_wrap=True)


def _say_failed(folder: "RunFolder", error: Exception) -> None:
    with contextlib.suppress(OSError):  # a full disk may be the reason
        folder.event("failed", error=str(error))
    complaints.print(f"failed: {error}", style="red", soft_wrap=True)
    complaints.print(f"The record so far is in {folder.path}, details in run.log.", soft_wrap=True)
    _log_traceback()


def _start_again(path: Path, again: int, minutes: float | None, more: list[str]) -> NoReturn:
    """This process anew, in which nothing is left of a team that lost a rank."""
    os.environ[AGAIN] = str(again)
    if minutes is not None:
        os.environ[MINUTES] = str(minutes)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "quartet", "run", str(path), "--resume", *more])


def _say_what(settings: "Settings", job: "Job", folder: "RunFolder", fault: str | None, choice: "Choice | None") -> "Plan":
    """What will be run, what it takes, and what a person should know before."""
    from quartet.plan import in_words
    from quartet.plan import plan as make_plan

    console.print(_first_line(settings, job, folder.path), soft_wrap=True)
    planned = make_plan(settings.config)
    console.print(f"plan   {in_words(planned)}", soft_wrap=True)
    if choice is not None:
        since = choice.checkpoint
        folder.event("resumed", checkpoint=since.name, accepted=list(choice.accepted), skipped=dict(choice.reasons()))
        console.print(f"resume {since.name}, of {folder.path}", soft_wrap=True)
        for sentence in choice.accepted:
            console.print(f"note   {sentence}", style="yellow", soft_wrap=True)
    planted = [] if fault is None else [f"--break {fault}: this run has a mistake on purpose."]
    for note in [*planted, *job.notes]:
        folder.event("note", sentence=note)
        console.print(f"note   {note}", style="yellow", soft_wrap=True)
    return planned


def _say_where(folder: Path, root: str) -> None:
    """What there is now, and what one can do with it."""
    from quartet.observability.reader import Run
    from quartet.studio.report import write_report

    console.print(f"run    {folder}    peak {_peak_bytes() / 1e6:,.0f} MB", soft_wrap=True)
    try:
        write_report(Run(folder))
        console.print(f"report {folder / 'report.html'}", soft_wrap=True)
    except Exception:  # the run is done whatever becomes of the page about it
        _log_traceback()
        console.print("report could not be written, see run.log", style="yellow", soft_wrap=True)
    talk = f", quartet chat {folder}" if (folder / "policy").is_dir() else ""
    console.print(f"next   quartet studio{'' if root == 'runs' else f' {root}'}{talk}", soft_wrap=True)


def _build(settings: "Settings", fault: str | None) -> "Job":
    from quartet.machine import keep_freed_memory, unmet

    if wrong := unmet():
        refuse("\n".join(wrong))
    from quartet.build import build
    from quartet.data import DataError
    from quartet.faults import FAULTS
    from quartet.launch.start import team_of
    from quartet.models.adapters import AdapterError
    from quartet.models.chat import ChatError
    from quartet.models.language_model import ModelError
    from quartet.observability.sinks import TrackerMissing
    from quartet.rewards.protocol import RewardError

    keep_freed_memory(in_parts=bool(settings.config.launch.shard))
    if fault is not None and (fault not in FAULTS or settings.config.rl_stage is None):
        refuse(
            f"--break {fault}: " + ("there is no RL stage to break." if fault in FAULTS else f"known are {', '.join(FAULTS)}.")
        )
    try:
        return build(settings.config, fault, team_of(settings.config.launch))
    except (DataError, ModelError, AdapterError, ChatError, RewardError, TrackerMissing) as error:
        refuse(str(error))


def _first_line(settings: "Settings", job: "Job", folder: Path) -> str:
    import torch

    place = job.device.type
    threads = f", {torch.get_num_threads()} threads" if place == "cpu" else ""
    return f"quartet {__version__} · {place}{threads} · fp32 · seed {settings.config.seed} · {folder}"


def _send_chatter_to(path: Path) -> None:
    """What other libraries log and warn about goes to the run's log, not over the live lines."""
    import logging
    import warnings

    import transformers

    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    without_progress_bars()


def _log_traceback() -> None:
    import logging

    logging.exception("the run failed")


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
