"""What `quartet run` prints while a run is carried out, and the exit code that it ends with."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from quartet import __version__
from quartet.cli.common import (
    FAILED,
    INTERRUPTED,
    RESUMABLE,
    complaints,
    console,
    refusing,
)
from quartet.cli.printing import outlive_readers
from quartet.io.texts import typed

if TYPE_CHECKING:
    from quartet.config.toml import Settings
    from quartet.planning.plan import Plan
    from quartet.runtime.interruption import Interruption
    from quartet.runtime.job import Job
    from quartet.runtime.lifecycle import Execution
    from quartet.runtime.requests import ResumeRequest

AGAIN, MINUTES = "QUARTET_RESTARTED", "QUARTET_MINUTES_LEFT"
"""Environment variables for a process that starts itself again: how often it did, and how many
minutes it has left."""


def new_run(settings: "Settings", fault: str | None) -> int:
    """Start a new run; return the exit code. Everything that can be refused is refused before its
    folder exists."""
    from quartet.runtime.lifecycle import begin

    with refusing():
        execution = begin(settings, _job(settings, fault), fault)
    for note in settings.notes:
        _note(note)
    return _carry_out(execution)


def go_on(request: "ResumeRequest", fault: str | None, accept: list[str]) -> int:
    """Resume a run from its newest usable checkpoint; return the exit code."""
    from quartet.runtime.lifecycle import AlreadyDone, open_folder, resume

    settings = request.settings
    if os.environ.get("RANK", "0") == "0":
        for note in request.notes:
            _note(note)
    if request.path is None:
        _print("There is no run of this name to resume: a new one begins.")
        return new_run(settings, fault)
    with refusing():
        folder = open_folder(request.path)
        job = _job(settings, fault)
        try:
            execution = resume(folder, settings, job, fault, accept)
        except AlreadyDone:
            _say_done(request.path, settings)
            return 0
    if execution.choice is None:
        _print(f"{request.path} had not begun when it stopped: it begins now.")
    return _carry_out(execution)


def _carry_out(execution: "Execution") -> int:
    """Carry out a run and print what happens. Return the exit code."""
    import dataclasses

    from quartet.assembly.device import planned_device
    from quartet.cli.screen import Screen, sample_lines
    from quartet.launch.start import open_workers
    from quartet.planning.gpu_plan import plan_on
    from quartet.runtime.events import Finished, StageFailed
    from quartet.runtime.interruption import Interrupted, Interruption
    from quartet.runtime.lifecycle import Noted, Resumed
    from quartet.runtime.log import log_to
    from quartet.runtime.worker import WorkerLost

    outlive_readers()
    settings, path, fault = execution.settings, execution.folder.path, execution.fault
    screen, on_gpu = Screen(console), execution.job.device.type != "cpu"
    planned = plan_on(execution.job.config, planned_device(execution.job.device))
    # The peak that a run records is that of its main memory.
    facts = {
        "planned_peak_bytes": None if on_gpu else planned.peak,
        "planned_seconds": planned.seconds,
    }
    execution = dataclasses.replace(execution, planned=facts)
    minutes = float(os.environ.get(MINUTES, "0")) or settings.config.run.max_minutes
    interruption = Interruption(minutes, screen.notice)
    samples: list[dict[str, str]] = []
    try:
        log_to(path / "run.log")
        _say_what(execution, planned)
        open_group = lambda job, folder: open_workers(settings.config, job, folder, fault)  # noqa: E731
        with interruption:
            for event in execution.events(open_group, interruption):
                if isinstance(event, Noted):
                    _note(event.sentence)
                elif isinstance(event, Resumed):
                    _print(f"resume {event.checkpoint}, of {event.folder}")
                else:
                    screen.show(event)
                if isinstance(event, Finished) and "samples" in event.summary:
                    samples = event.summary["samples"]
    except (Interrupted, WorkerLost) as reason:
        screen.close()
        return _stopped(execution, reason, interruption)
    except (StageFailed, OSError) as error:
        screen.close()
        _say_failed(execution, error)
        return FAILED
    finally:
        screen.close()
    for line in sample_lines(samples):
        console.print(line, soft_wrap=True)
    _say_where(path, settings.config.run.folder)
    return 0


def _stopped(execution: "Execution", reason: BaseException, interruption: "Interruption") -> int:
    """Say why a run was stopped and how to resume it, or start it again where the config says so.
    Return the exit code."""
    from quartet.runtime.interruption import Interrupted
    from quartet.runtime.worker import WorkerLost

    again = int(os.environ.get(AGAIN, "0")) + 1
    restarts = execution.settings.config.launch.restarts
    starts_again = isinstance(reason, WorkerLost) and again <= restarts
    if isinstance(reason, Interrupted):
        sentence = reason.in_words()
    else:
        sentence = f"stopped: {str(reason).rstrip('.')}. The last checkpoint is whole"
    next_step = (
        "the run goes on from it" if starts_again else f"go on with: {execution.resume_command}"
    )
    _print(f"{sentence}; {next_step}")
    if starts_again:
        _start_again(execution, again, interruption.minutes_left())
    return RESUMABLE


def _start_again(execution: "Execution", again: int, minutes: float | None) -> NoReturn:
    """Replace this process by a new one, without the process group that lost a rank."""
    os.environ[AGAIN] = str(again)
    if minutes is not None:
        os.environ[MINUTES] = str(minutes)
    sys.stdout.flush()
    words = ["run", str(execution.folder.path), "--resume", *execution.options]
    os.execv(sys.executable, [sys.executable, "-m", "quartet", *words])


def _say_done(path: Path, settings: "Settings") -> None:
    """Say that a run is done and how to add steps. Write its report if a kill came before it."""
    from quartet.config.tables import StageTraining
    from quartet.runs.reader import Run
    from quartet.runtime.resume import setting, steps_of
    from quartet.stages.kinds import kind_of

    _print(f"{path} is done: {Run(path)!r}")
    if not (path / "report.html").is_file():
        _write_report(path)
    steps = steps_of(settings.config)
    if not steps:
        return
    stage = list(steps)[-1]
    kind = kind_of(stage)
    assert kind is not None and kind.steps is not None and kind.optim is not None
    training, more = setting(settings.config, kind.optim), f"{kind.steps}={2 * steps[stage]}"
    if isinstance(training, StageTraining) and training.epochs is not None:
        more = f"{kind.optim}.epochs={2 * training.epochs:g}"
    accept = f" --accept {kind.steps}" if training.depends_on_total else ""
    command = f"quartet run {typed(path)} --resume {more}{accept}"
    _print(f"next   to add steps: {command}")


def _say_failed(execution: "Execution", error: Exception) -> None:
    """Say what ended a run, and what is left of it. If a disk is full: how to go on once there is
    room."""
    from quartet.runtime.lifecycle import failure, is_full
    from quartet.runtime.log import log_traceback

    path = execution.folder.path
    complaints.print(f"failed: {failure(error, path)}", style="red", soft_wrap=True)
    if is_full(error):
        advice = f"Make room on the disk, then go on with: {execution.resume_command}"
    else:
        advice = f"The record so far is in {path}, details in run.log."
    complaints.print(advice, style="red", soft_wrap=True)
    log_traceback()


def _say_what(execution: "Execution", planned: "Plan") -> None:
    """Say what will be run and what it takes."""
    from quartet.planning.plan import in_words

    _print(_first_line(execution.settings, execution.job, execution.folder.path))
    _print(f"plan   {in_words(planned)}")


def _first_line(settings: "Settings", job: "Job", folder: Path) -> str:
    import torch

    place, count = job.device.type, torch.get_num_threads()
    threads = f", {count} thread{'s' * (count != 1)}" if place == "cpu" else ""
    seed = settings.config.seed
    return f"quartet {__version__} · {place}{threads} · {job.precision} · seed {seed} · {folder}"


def _say_where(folder: Path, root: str) -> None:
    """Say where the run is and what can be done with it."""
    import torch

    from quartet.runtime.lifecycle import peak_bytes

    peak = peak_bytes()
    memory = "" if peak is None else f"    peak {peak / 1e6:,.0f} MB"
    if torch.cuda.is_initialized():  # otherwise other processes trained, or none on a GPU
        memory += f", GPU {torch.cuda.max_memory_reserved() / 1e6:,.0f} MB"
    _print(f"run    {folder}{memory}")
    _write_report(folder)
    chat = f", quartet chat {typed(folder)}" if (folder / "policy").is_dir() else ""
    _print(f"next   quartet studio{'' if root == 'runs' else f' {typed(root)}'}{chat}")


def _write_report(folder: Path) -> None:
    from quartet.cli.screen import working
    from quartet.runtime.lifecycle import write_report

    with working(console, "writing the report"):
        report = write_report(folder)
    if report is not None:
        _print(f"report {report}")
    else:
        _note("could not be written, see run.log", "report")


def _job(settings: "Settings", fault: str | None) -> "Job":
    """Return the job of these settings, in a process that keeps the memory that it frees."""
    from quartet.cli.screen import working
    from quartet.io.heap import keep_freed_memory
    from quartet.launch.start import job_of

    keep_freed_memory(sharded=bool(settings.config.launch.shard))
    try:
        with working(console, "preparing"):
            return job_of(settings.config, fault)
    except KeyboardInterrupt:
        _print("stopped by Ctrl-C before the run began: nothing was written")
        raise typer.Exit(INTERRUPTED) from None


def _print(text: str) -> None:
    console.print(text, soft_wrap=True)


def _note(sentence: str, label: str = "note  ") -> None:
    console.print(f"{label} {sentence}", style="yellow", soft_wrap=True)
