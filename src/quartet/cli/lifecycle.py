"""A run from its first event to its last: begun, gone on with, stopped, failed or done."""

import contextlib
import errno
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from quartet import __version__
from quartet.cli.common import (
    FAILED,
    RESUMABLE,
    complaints,
    console,
    refuse,
    typed,
    without_progress_bars,
)
from quartet.cli.printing import outlive_readers
from quartet.recipes import recipe_names, recipe_path

if TYPE_CHECKING:
    from quartet.assembly import Job
    from quartet.cli.screen import Screen
    from quartet.config.toml import Settings
    from quartet.planning.plan import Plan
    from quartet.recording.run_folder import RunFolder
    from quartet.runtime.interruption import Interruption
    from quartet.runtime.resume import Choice

DEFAULT = "reviews"
AGAIN, MINUTES = "QUARTET_RESTARTED", "QUARTET_MINUTES_LEFT"
"""What a process that starts itself again tells the next: how often that was, and how long it may
take."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says where there is no room for a file."""


def settings_of(
    what: str, words: list[str], known_links: Mapping[str, str] = MappingProxyType({})
) -> "Settings":
    """A recipe's name or a file, and what is said beside it. `known_links`: where links led when a
    run began."""
    from quartet.config.toml import ConfigError, read_settings

    if (Path(what) / "events.jsonl").is_file():
        refuse(f"{what}: is a run's folder. To go on with it: quartet run {typed(what)} --resume")
    if (
        "=" in what and not Path(what).exists()
    ):  # quartet run seed=1: the default recipe with a setting
        what, words = DEFAULT, [what, *words]
    path = recipe_path(what)
    shown = f"recipe {what}" if path else None
    if path is None and not what.endswith(".toml"):
        from quartet.config.tables import did_you_mean

        near = did_you_mean(what, recipe_names())
        refuse(
            f'"{what}": no such recipe, and not a .toml file.{near} Recipes are '
            f"{', '.join(recipe_names())}."
        )
    try:
        return read_settings(path or Path(what), words, shown, known_links)
    except ConfigError as error:
        refuse(str(error))


def run_to_resume(what: str | None, words: list[str]) -> "tuple[Path | None, Settings]":
    """The run folder, None where there is none of that name yet, and the config to go on with."""
    from quartet.recording.run_folder import beginning_of
    from quartet.runtime.resume import find_run

    if what is not None and "=" in what and not Path(what).exists():
        words = [what, *words]
        what = None
    folder = Path(what or "runs/latest")
    if (folder / "events.jsonl").is_file():
        if not (folder / "config.resolved.toml").is_file():
            refuse(f"{folder}: has no config.resolved.toml, so it is not known what to go on with.")
        return folder.resolve(), _settings_of_run(folder, words)
    if what is None:
        refuse("runs/latest: there is no run to resume. Name one: quartet run runs/… --resume")
    settings = settings_of(what, words)
    run = settings.config.run
    found = find_run(Path(run.folder), run.name or settings.name)
    if found is not None and (links := beginning_of(found).links):
        settings = settings_of(
            what, words, links
        )  # `runs/latest` is another run now, this one among them
    return found, settings


def _settings_of_run(folder: Path, words: list[str]) -> "Settings":
    """The config in a run's folder with words on top. Where it names files that are not here but
    where the run was started, that becomes the working directory."""
    from quartet.config.links import absolute_word, relative_paths
    from quartet.config.tables import json_ready
    from quartet.recording.run_folder import beginning_of

    config, began = str(folder / "config.resolved.toml"), beginning_of(folder)
    settings = settings_of(config, words, began.links)
    if began.folder is None or began.folder == Path.cwd():
        return settings
    first = os.environ.get("RANK", "0") == "0"
    if first:
        console.print(
            f"note   the run was started in {began.folder}", style="yellow", soft_wrap=True
        )
    away = [
        p
        for p in relative_paths(json_ready(settings.config))
        if not p.exists() and (began.folder / p).exists()
    ]
    if not away:
        return settings
    if first:
        console.print(
            f"note   {away[0]} is not here but there: paths are taken from there",
            style="yellow",
            soft_wrap=True,
        )
    words, config = [absolute_word(word) for word in words], str(Path(config).resolve())
    os.chdir(began.folder)
    return settings_of(config, words, began.links)


def new_run(settings: "Settings", fault: str | None) -> int:
    """A new run. Everything that can be refused is refused before its folder exists."""
    from quartet.config.toml import resolved_toml
    from quartet.recording.run_folder import RunFolder

    job, config = _build(settings, fault), settings.config
    files = {"config.toml": settings.text, "config.resolved.toml": resolved_toml(settings)}
    try:
        folder = RunFolder.create(
            Path(config.run.folder), config.run.name or settings.name, files, settings.links
        )
    except OSError as error:
        refuse(
            f'run.folder = "{config.run.folder}": cannot be written ({error.strerror or error}).'
        )
    return _work(settings, job, folder, fault)


def go_on(path: Path | None, settings: "Settings", fault: str | None, accept: list[str]) -> int:
    """From the newest checkpoint that can be used."""
    from quartet.recording.run_folder import RunFolder
    from quartet.runs.untrusted import Unreadable
    from quartet.runtime.resume import CannotResume, choose, has_begun, set_aside, steps_of

    if path is None:
        console.print("There is no run of this name to resume: a new one begins.", soft_wrap=True)
        return new_run(settings, fault)
    try:
        folder = RunFolder(path)
        record = folder.record()
    except OSError as error:
        refuse(
            str(error) if error.errno is None else f"{path}: cannot be written ({error.strerror})."
        )
    except Unreadable as error:
        refuse(f"{path / 'events.jsonl'}: {error}")
    job = _build(settings, fault)
    choice = None
    if has_begun(path):
        try:
            choice = choose(path, settings.config, job.made_with, accept)
        except CannotResume as error:
            folder.close()
            refuse(str(error))
        facts = choice.checkpoint.facts
        more_to_do = choice.skipped or facts["step"] < steps_of(settings.config).get(
            facts["stage"], 0
        )
        if record.is_done and not more_to_do:
            folder.sweep()
            folder.close()
            _say_done(path, settings)
            return 0
        for checkpoint, reason in choice.skipped:
            console.print(
                f"note   checkpoint {checkpoint.name} was skipped: {reason}",
                style="yellow",
                soft_wrap=True,
            )
        set_aside(choice.skipped)
        folder.become_latest()
    else:
        console.print(f"{path} had not begun when it stopped: it begins now.", soft_wrap=True)
    return _work(settings, job, folder, fault, choice, accept, resumed=True)


def _say_done(path: Path, settings: "Settings") -> None:
    """That a run is done, and how to make it longer. The report is written where a kill came before
    it."""
    from quartet.runs.reader import Run
    from quartet.runtime.resume import steps_of

    console.print(f"{path} is done: {Run(path)!r}", soft_wrap=True)
    if not (path / "report.html").is_file():
        _write_report(path)
    config, lengths = settings.config, steps_of(settings.config)
    if not lengths:
        return
    stage = config.rl_stage or config.preference_stage or list(lengths)[-1]
    key, schedule = {
        config.rl_stage: ("run.steps", config.optim.schedule),
        config.preference_stage: ("preference.steps", config.preference.schedule),
        "reward_model": ("reward_model.steps", config.reward_model.schedule),
        "sft": ("sft.steps", config.sft.schedule),
    }[stage]
    accept = (
        "" if schedule == "constant" else f" --accept {key}"
    )  # its learning rates looked ahead to the end
    more = f"quartet run {typed(path)} --resume {key}={2 * lengths[stage]}{accept}"
    console.print(f"next   to add steps: {more}", soft_wrap=True)


def _work(
    settings: "Settings",
    job: "Job",
    folder: "RunFolder",
    fault: str | None,
    choice: "Choice | None" = None,
    accept: Sequence[str] = (),
    resumed: bool = False,
) -> int:
    """From the first event to the last, whatever ends it. `accept`: the settings that may have
    changed."""
    from quartet.cli.screen import Screen, sample_lines
    from quartet.runtime.interruption import Interrupted, Interruption
    from quartet.runtime.pipeline import StageFailed
    from quartet.runtime.worker import WorkerLost

    outlive_readers()
    words = [word for key in accept for word in ("--accept", key)] + (
        ["--break", fault] if fault else []
    )
    resume = " ".join(["quartet run", typed(folder.path), "--resume", *map(shlex.quote, words)])
    screen, launch = Screen(console), settings.config.launch
    interruption = Interruption(
        float(os.environ.get(MINUTES, "0")) or settings.config.run.max_minutes, screen.notice
    )
    with contextlib.ExitStack() as open_things:
        open_things.callback(folder.close)
        open_things.callback(screen.close)
        try:
            _send_chatter_to(folder.path / "run.log")
            if resumed:
                _renew(folder, settings, choice)
            samples = _through(
                settings, job, folder, fault, choice, screen, interruption, open_things
            )
        except (Interrupted, WorkerLost) as reason:
            screen.close()
            with contextlib.suppress(OSError):  # a full disk may be why it is to stop
                folder.event("interrupted", reason=str(reason))
            again = int(os.environ.get(AGAIN, "0")) + 1
            goes_on = isinstance(reason, WorkerLost) and again <= launch.restarts
            _say_stopped(reason, None if goes_on else resume)
            if not goes_on:
                return RESUMABLE
            open_things.close()
            _start_again(folder.path, again, interruption.minutes_left(), words)
        except (StageFailed, OSError) as error:
            screen.close()
            _say_failed(folder, error, resume)
            return FAILED
    for line in sample_lines(samples):
        console.print(line, soft_wrap=True)
    _say_where(folder.path, settings.config.run.folder)
    return 0


def _through(
    settings: "Settings",
    job: "Job",
    folder: "RunFolder",
    fault: str | None,
    choice: "Choice | None",
    screen: "Screen",
    interruption: "Interruption",
    open_things: contextlib.ExitStack,
) -> Sequence[Mapping[str, str]]:
    """All stages that are still to do; the evaluation's samples."""
    from quartet.config.tables import json_ready
    from quartet.launch.start import crew
    from quartet.recording.tokens import TokenTexts
    from quartet.recording.trackers import Tracking
    from quartet.runtime.pipeline import Finished, Pipeline

    config, began = settings.config, time.monotonic()
    tracking = Tracking(config.run.track, folder.path, json_ready(config))
    open_things.callback(tracking.close)
    saving, texts = job.saving(config.run), TokenTexts(job.tokenizer)
    pipeline = Pipeline(
        job.stages, folder, texts, saving, tracking, interruption, strict=fault is None
    )
    since = None if choice is None else choice.checkpoint
    if since is not None:
        pipeline.cut_back(since)
    planned = _say_what(settings, job, folder, fault, choice)
    samples: Sequence[Mapping[str, str]] = ()
    with interruption, crew(config, job, folder.path, fault) as group:
        for event in pipeline.run(since, group):
            screen.show(event)
            if isinstance(event, Finished) and event.stage.name == "evaluation":
                samples = event.summary["samples"]
    planned_to = {"planned_peak_bytes": planned.peak, "planned_seconds": planned.seconds}
    folder.event(
        "done",
        None,
        None,
        peak_bytes=_peak_bytes(),
        seconds=round(time.monotonic() - began, 1),
        **planned_to,
    )
    return samples


def _renew(folder: "RunFolder", settings: "Settings", choice: "Choice | None") -> None:
    """The folder of a run that is to go on: what a killed process left half done goes, the config
    is the one of now."""
    from quartet import files as durable
    from quartet.config.toml import resolved_toml

    folder.sweep()
    if choice is None:
        folder.cut_back(0, -1)
    durable.replace(folder.path / "config.toml", settings.text)
    durable.replace(folder.path / "config.resolved.toml", resolved_toml(settings))


def _say_stopped(reason: BaseException, resume: str | None) -> None:
    """`resume`: the command that goes on; None where the run does by itself."""
    from quartet.runtime.interruption import Interrupted

    if isinstance(reason, Interrupted):
        said = f"stopped by {reason}. Nothing is lost"
    else:
        said = f"stopped: {str(reason).rstrip('.')}. The last checkpoint is whole"
    console.print(
        f"{said}; {'the run goes on from it' if resume is None else f'go on with: {resume}'}",
        soft_wrap=True,
    )


def _say_failed(folder: "RunFolder", error: Exception, resume: str) -> None:
    """One sentence on what failed, and one on what there is. Of a full disk: how to go on once
    there is room."""
    said = str(error)
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else str(error)
        said = f"{error.filename or folder.path} cannot be written ({reason})."
    with contextlib.suppress(OSError):  # a full disk may be the reason
        folder.event("failed", error=said)
    complaints.print(f"failed: {said}", style="red", soft_wrap=True)
    if _is_full(error):
        complaints.print(
            f"Make room on the disk, then go on with: {resume}", style="red", soft_wrap=True
        )
    else:
        complaints.print(
            f"The record so far is in {folder.path}, details in run.log.", soft_wrap=True
        )
    _log_traceback()


def _is_full(error: BaseException | None) -> bool:
    """Whether it, or what caused it, is that there is no room for a file."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False


def _start_again(path: Path, again: int, minutes: float | None, more: list[str]) -> NoReturn:
    """This process anew, in which nothing is left of a team that lost a rank."""
    os.environ[AGAIN] = str(again)
    if minutes is not None:
        os.environ[MINUTES] = str(minutes)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "quartet", "run", str(path), "--resume", *more])


def _say_what(
    settings: "Settings",
    job: "Job",
    folder: "RunFolder",
    fault: str | None,
    choice: "Choice | None",
) -> "Plan":
    """What will be run, what it takes, and what a person should know before."""
    from quartet.planning.plan import in_words
    from quartet.planning.plan import plan as make_plan

    console.print(_first_line(settings, job, folder.path), soft_wrap=True)
    planned = make_plan(settings.config)
    console.print(f"plan   {in_words(planned)}", soft_wrap=True)
    if choice is not None:
        since = choice.checkpoint
        folder.event(
            "resumed",
            checkpoint=since.name,
            accepted=list(choice.accepted),
            skipped=dict(choice.reasons()),
        )
        console.print(f"resume {since.name}, of {folder.path}", soft_wrap=True)
        if damaged := folder.record().damaged:
            lines = f"{damaged:,} line{'s' * (damaged != 1)}"
            console.print(
                f"note   {lines} of events.jsonl cannot be read and are passed over",
                style="yellow",
                soft_wrap=True,
            )
        for sentence in choice.accepted:
            console.print(f"note   {sentence}", style="yellow", soft_wrap=True)
    planted = [] if fault is None else [f"--break {fault}: this run has a mistake on purpose."]
    for note in [*planted, *job.notes]:
        folder.event("note", sentence=note)
        console.print(f"note   {note}", style="yellow", soft_wrap=True)
    return planned


def _say_where(folder: Path, root: str) -> None:
    """What there is now, and what one can do with it."""
    console.print(f"run    {folder}    peak {_peak_bytes() / 1e6:,.0f} MB", soft_wrap=True)
    _write_report(folder)
    talk = f", quartet chat {typed(folder)}" if (folder / "policy").is_dir() else ""
    console.print(
        f"next   quartet studio{'' if root == 'runs' else f' {typed(root)}'}{talk}", soft_wrap=True
    )


def _write_report(folder: Path) -> None:
    from quartet.runs.reader import Run
    from quartet.studio.report import write_report

    try:
        write_report(Run(folder))
        console.print(f"report {folder / 'report.html'}", soft_wrap=True)
    except Exception:  # the run is done whatever becomes of the page about it
        _log_traceback()
        console.print("report could not be written, see run.log", style="yellow", soft_wrap=True)


def _build(settings: "Settings", fault: str | None) -> "Job":
    from quartet.runtime.machine import keep_freed_memory, unmet

    if wrong := unmet():
        refuse("\n".join(wrong))
    from quartet.assembly import build
    from quartet.data import DataError
    from quartet.launch.start import team_of
    from quartet.models.adapters import AdapterError
    from quartet.models.chat import ChatError
    from quartet.models.language_model import ModelError
    from quartet.recording.trackers import TrackerMissing
    from quartet.rewards.protocol import RewardError
    from quartet.runtime.faults import FAULTS

    keep_freed_memory(in_parts=bool(settings.config.launch.shard))
    if fault is not None and (fault not in FAULTS or settings.config.rl_stage is None):
        refuse(
            f"--break {fault}: "
            + (
                "there is no RL stage to break."
                if fault in FAULTS
                else f"known are {', '.join(FAULTS)}."
            )
        )
    try:
        return build(settings.config, fault, team_of(settings.config.launch))
    except (DataError, ModelError, AdapterError, ChatError, RewardError, TrackerMissing) as error:
        refuse(str(error))


def _first_line(settings: "Settings", job: "Job", folder: Path) -> str:
    import torch

    place = job.device.type
    threads = f", {torch.get_num_threads()} threads" if place == "cpu" else ""
    return (
        f"quartet {__version__} · {place}{threads} · fp32 · seed {settings.config.seed} · {folder}"
    )


def _send_chatter_to(path: Path) -> None:
    """What other libraries log and warn about goes to the run's log, not over the live lines."""
    import logging
    import warnings

    import transformers

    logging.raiseExceptions = (
        False  # a full disk is said once, by the run, and not by every line of the log
    )
    log = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    logging.basicConfig(
        handlers=[log], level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True
    )
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
