"""The life of a run: it begins or is resumed, its stages are carried out, and its end is recorded.

The command line and the Python API both go this way. Neither printing nor exit codes are decided
here: `Execution.events` yields what happens, and raises what ended the run once that is recorded.
"""

import contextlib
import errno
import os
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files
from quartet.config.rules import untrained_filter
from quartet.config.tables import json_ready
from quartet.config.toml import Settings, resolved_toml
from quartet.errors import QuartetError
from quartet.io.texts import typed
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import Tracking
from quartet.runs.untrusted import Unreadable
from quartet.runtime.events import Event, StageFailed
from quartet.runtime.interruption import Interrupted, Interruption
from quartet.runtime.job import Job
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.resume import (
    CannotResume,
    CheckpointChoice,
    choose,
    has_begun,
    set_aside,
    steps_of,
)
from quartet.runtime.worker import WorkerGroup, WorkerLost

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The error numbers of a file system that has no room for a file."""

TOO_OFTEN = 2
"""How often a run is resumed from the same checkpoint until that is spoken of."""

OpenGroup = Callable[[Job, Path], AbstractContextManager[WorkerGroup]]
"""Starts the workers of a job in a run folder, and ends them."""


class CannotRun(QuartetError, ValueError):
    """A run that cannot begin or go on as it was asked for: one sentence."""


class AlreadyDone(QuartetError):
    """A run that was to be resumed has no steps left. `path` is its folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: is done, there is nothing to resume.")
        self.path = path


@dataclass(frozen=True)
class Resumed:
    """A run goes on from a checkpoint."""

    checkpoint: str
    folder: Path


@dataclass(frozen=True)
class Noted:
    """A sentence that the user should know before the first stage starts."""

    sentence: str


@dataclass(frozen=True)
class Execution:
    """A run with its folder open, ready to be carried out."""

    settings: Settings
    job: Job
    folder: RunFolder
    fault: str | None = None
    """The fault that is planted on purpose, see `runtime/faults.py`."""
    resumed: bool = False
    choice: CheckpointChoice | None = None
    """The checkpoint that a resumed run goes on from; None: it had not begun."""
    accept: tuple[str, ...] = ()
    """The settings that may differ from those of the checkpoint."""
    planned: Mapping[str, float | None] | None = None
    """What the plan said, to be recorded beside what the run took."""

    @property
    def options(self) -> list[str]:
        """The options that a command which resumes this run must repeat."""
        accept = [word for key in self.accept for word in ("--accept", key)]
        return accept + (["--break", self.fault] if self.fault else [])

    @property
    def resume_command(self) -> str:
        """The command that resumes this run, as it is typed in a shell."""
        return " ".join(
            ["quartet run", typed(self.folder.path), "--resume", *map(shlex.quote, self.options)]
        )

    def events(
        self, open_group: OpenGroup, interruption: Interruption
    ) -> Generator[Event | Resumed | Noted, None, None]:
        """Carry out all stages that are left; yield each event when it is recorded.

        Raises, when the run folder says so too, `Interrupted` for a signal or the time limit,
        `WorkerLost` for a rank that is gone, `StageFailed` for a stage that cannot go on, and
        OSError for a run folder that cannot be written. The folder is closed in any case.
        """
        with contextlib.ExitStack() as opened:
            opened.callback(self.folder.close)
            try:
                yield from self._events(open_group, interruption, opened)
            except (Interrupted, WorkerLost) as reason:
                self._record("interrupted", reason=str(reason))
                raise
            except GeneratorExit:
                self._record("interrupted", reason=interruption.reason or "the caller")
                raise
            except (StageFailed, OSError) as error:
                self._record("failed", error=failure(error, self.folder.path))
                raise

    def _events(
        self, open_group: OpenGroup, interruption: Interruption, opened: contextlib.ExitStack
    ) -> Iterator[Event | Resumed | Noted]:
        began, config, path = time.monotonic(), self.settings.config, self.folder.path
        if self.resumed:
            self._renew()
        tracking = Tracking(config.run.track, path, json_ready(config))
        opened.callback(tracking.close)
        pipeline = Pipeline(
            self.job.stages,
            self.folder,
            TokenTexts(self.job.tokenizer),
            self.job.saving(config.run),
            tracking,
            interruption,
            strict=self.fault is None,
        )
        since = None if self.choice is None else self.choice.checkpoint
        before = 0 if since is None else self._times_resumed(since.name)
        if since is not None:
            pipeline.cut_back(since)
        yield from self._opening(before)
        group = opened.enter_context(open_group(self.job, path))
        yield from pipeline.run(since, group)
        self.folder.event(
            "done",
            None,
            None,
            peak_bytes=peak_bytes(),
            seconds=round(time.monotonic() - began, 1),
            **(self.planned or {}),
        )

    def _times_resumed(self, checkpoint: str) -> int:
        """Return how often the run was resumed from a checkpoint and wrote no other. Read it before
        the record is cut back to the checkpoint, where nothing of that is left."""
        resumed = [e for e in self.folder.record().events if e["event"] == "resumed"]
        if not resumed or resumed[-1].get("checkpoint") != checkpoint:
            return 0
        before = resumed[-1].get("before")
        return 1 + (before if isinstance(before, int) else 0)

    def _opening(self, before: int) -> Iterator[Resumed | Noted]:
        """Record and yield what the user should know before the first stage starts. `before` is how
        often the run was resumed from the same checkpoint."""
        notes = []
        if self.choice is not None:
            name = self.choice.checkpoint.name
            accepted = list(self.choice.accepted)
            skipped = dict(self.choice.reasons())
            self.folder.event(
                "resumed", checkpoint=name, accepted=accepted, skipped=skipped, before=before
            )
            for checkpoint, reason in skipped.items():
                yield Noted(f"checkpoint {checkpoint} was skipped: {reason}")
            yield Resumed(name, self.folder.path)
            if before >= TOO_OFTEN:
                yield Noted(
                    f"the run was resumed from {name} {before} times before and stopped before its "
                    "next checkpoint. If that goes on, it gets no further: give it more time at "
                    "once, smaller steps (rollout.prompts_per_step), or a smaller "
                    "run.checkpoint_every"
                )
            if damaged := self.folder.record().damaged:
                lines = f"{damaged:,} line{'s' * (damaged != 1)}"
                yield Noted(f"{lines} of events.jsonl cannot be read and are passed over")
            yield from map(Noted, accepted)
        if self.fault is not None:
            notes.append(f"--break {self.fault}: this run has a mistake on purpose.")
        for note in [*notes, *self.job.notes]:
            self.folder.event("note", sentence=note)
            yield Noted(note)

    def _renew(self) -> None:
        """Remove what a killed process left half done, and write the config as it is now."""
        self.folder.sweep()
        if self.choice is None:
            self.folder.cut_back(0, -1)
        files.replace(self.folder.path / "config.toml", self.settings.text)
        files.replace(self.folder.path / "config.resolved.toml", resolved_toml(self.settings))

    def _record(self, event: str, **facts: Any) -> None:
        """Record how the run ended; a full disk may be the reason, so it is only tried."""
        with contextlib.suppress(OSError):
            self.folder.event(event, **facts)


def begin(settings: Settings, job: Job, fault: str | None = None) -> Execution:
    """Create the folder of a new run. Raises `CannotRun` if it cannot be written, or if the run
    would sample from another distribution than it trains."""
    if (problem := untrained_filter(settings.config)) is not None:
        raise CannotRun(problem)
    run = settings.config.run
    texts = {"config.toml": settings.text, "config.resolved.toml": resolved_toml(settings)}
    try:
        folder = RunFolder.create(
            Path(run.folder), run.name or settings.name, texts, settings.links
        )
    except OSError as error:
        raise CannotRun(
            f'run.folder = "{run.folder}": cannot be written ({error.strerror or error}). Name '
            "another folder, such as run.folder=runs."
        ) from error
    return Execution(settings, job, folder, fault)


def open_folder(path: Path) -> RunFolder:
    """Open the folder of a run that is to be resumed; no other process can write it meanwhile.
    Raises `CannotRun` if that is not possible or its record cannot be read."""
    try:
        folder = RunFolder(path)
        folder.record()
    except OSError as error:
        words = str(error) if error.errno is None else None
        raise CannotRun(words or f"{path}: cannot be written ({error.strerror}).") from error
    except Unreadable as error:
        raise CannotRun(f"{path / 'events.jsonl'}: {error}") from error
    return folder


def resume(
    folder: RunFolder,
    settings: Settings,
    job: Job,
    fault: str | None = None,
    accept: Sequence[str] = (),
) -> Execution:
    """Return the run as it goes on from the newest checkpoint that can be used, or from its
    beginning if it had not begun.

    Raises `CannotResume` if no checkpoint can be used or a setting changed that is not in `accept`,
    and `AlreadyDone` if no step is left. The folder is closed then.
    """
    path = folder.path
    if not has_begun(path):
        return Execution(settings, job, folder, fault, resumed=True, accept=tuple(accept))
    try:
        choice = choose(path, job.config, job.made_with, accept)
    except CannotResume:
        folder.close()
        raise
    facts = choice.checkpoint.facts
    steps = steps_of(job.config).get(facts["stage"], 0)
    ended = facts["step"] >= steps or (facts.get("ended", False) and not choice.accepted)
    if folder.record().is_done and not choice.skipped and ended:
        folder.sweep()
        folder.close()
        raise AlreadyDone(path)
    set_aside(choice.skipped)
    folder.become_latest()
    return Execution(settings, job, folder, fault, True, choice, tuple(accept))


def failure(error: BaseException, path: Path) -> str:
    """Return a sentence on what ended a run. `path` is the run folder."""
    if not isinstance(error, OSError):
        return str(error)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{error.filename or path} cannot be written ({reason})."


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is that a disk has no room for a file."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False


def write_report(path: Path) -> Path | None:
    """Write the report of a run into its folder. Return its path; None if it could not be written,
    which the log then explains: the run itself is done all the same."""
    import logging

    from quartet.runs.reader import Run
    from quartet.studio.report import write_report as write

    try:
        write(Run(path))
    except Exception:
        logging.getLogger(__name__).exception("the report could not be written")
        return None
    return path / "report.html"


def peak_bytes() -> int | None:
    """Return the most memory that this process has had, in bytes; None where the system does not
    say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
