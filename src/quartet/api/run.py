"""A run in Python: iterate over its steps, or finish it; read its folder; resume it."""

import atexit
import dataclasses
import html
import re
import sys
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quartet.api.inputs import POLICIES, inputs_of, plain
from quartet.config.errors import toml_value
from quartet.config.run import Role
from quartet.config.toml import ConfigError, Settings
from quartet.errors import QuartetError
from quartet.io.heap import keep_freed_memory, share_one_heap
from quartet.io.texts import typed
from quartet.io.threads import left_behind
from quartet.launch.start import job_of, open_workers
from quartet.loops.progress import Progress
from quartet.models.actor_critic import freeze
from quartet.models.precision import compute_in, dtype_of
from quartet.rewards.objects import ObjectSource
from quartet.runs.reader import Run
from quartet.runs.wording import where
from quartet.runtime.events import Advanced, Event, Finished, Started, Warned
from quartet.runtime.interruption import Interrupted, Interruption
from quartet.runtime.lifecycle import (
    AlreadyDone,
    Execution,
    Noted,
    begin,
    open_folder,
    resume,
    write_report,
)
from quartet.runtime.log import logging_to, no_progress_bars
from quartet.runtime.requests import run_to_resume
from quartet.runtime.resume import CannotResume

_OPEN: dict[Path, Generator[Any, None, None]] = {}
"""The runs of this process that are under way, by their folders."""


class RunInterrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, SIGTERM or its time limit. Iterate over it again, or call
    `finish()`, and it goes on from its last checkpoint. The message says what is taken again."""


class TrainingRun:
    """A run, made by `quartet.train`.

    >>> run = quartet.train("sums", steps=50)  # doctest: +SKIP
    >>> for step in run:  # doctest: +SKIP
    ...     print(step.number, step.metrics["reward"])

    Attributes:
        stage: the name of the stage that is running, "ppo" for example.
        summaries: what each finished stage said at its end, by stage.
        warnings: sentences of the doctor and about memory.
        notes: sentences about the settings.
    """

    def __init__(
        self,
        settings: Settings,
        objects: Mapping[str, Any],
        path: Path | None = None,
        accept: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """`objects` are the rewards that were given as objects, by name; `path` is the folder of a
        run that is to be resumed."""
        launch = settings.config.launch
        if launch.type == "torchrun":
            raise ConfigError(
                'launch.type = "torchrun": torchrun starts the command line, not a program. Put '
                "the settings into a file: torchrun … -m quartet run FILE.toml."
            )
        if objects and (launch.processes > 1 or launch.type != "local"):
            raise ConfigError(
                "launch: several processes cannot share a reward that was given as a Python "
                'object. Put the function into a file: reward="file.py:name".'
            )
        self.settings, self.objects, self.accept = settings, dict(objects), tuple(accept)
        with no_progress_bars():
            self.job = job_of(settings.config, None, self.objects)
        self._folder = path
        self._unused = weakref.finalize(self, _was_not_begun)
        self.stage: str | None = None
        self.summaries: dict[str, Mapping[str, Any]] = {}
        self.warnings: list[str] = []
        self.notes = list(notes)
        self.finished = False
        self._steps: Generator[Progress, None, None] | None = None
        self._events: Generator[Any, None, None] | None = None
        """What carries out the run, while it is under way."""
        self._started: Started | None = None
        """The stage that is running, with the number of its finished steps."""
        self._screen: Any = None

    @classmethod
    def resumed(
        cls,
        path: Path,
        arguments: Mapping[str, Any],
        settings: Mapping[str, Any],
        accept: Sequence[str],
    ) -> "TrainingRun":
        """Return the run of a folder, to go on from its last checkpoint with changed settings."""
        request = run_to_resume(str(path))
        changes = inputs_of(request.settings.config.recipe, arguments, settings)
        del changes.table["recipe"]
        if changes.objects:  # the [[reward]] tables are those of the run
            changes.table.pop("reward")
        sources = request.settings.config.reward
        names = [source.object for source in sources if isinstance(source, ObjectSource)]
        if changes.objects and len(names) != len(changes.objects):
            raise ConfigError(
                f"reward: the run has {', '.join(names) or 'no reward'} as Python objects, and "
                f"{', '.join(changes.objects)} was given. Give the same, in the same order."
            )
        objects = dict(zip(names, changes.objects.values(), strict=False))
        words = [f"{key}={toml_value(value)}" for key, value in _leaves(changes.table)]
        if words:
            request = run_to_resume(str(request.path), words)
        return cls(request.settings, objects, request.path, accept, request.notes)

    def __iter__(self) -> Iterator[Progress]:
        """Return the steps that are left, of all stages. RL steps are `quartet.Step`s with
        rollouts, batch and experience; others have a number and metrics."""
        self._unused.detach()
        if self._was_taken_over():
            self.close()
        if self._steps is None:
            self._steps = self._advance()
        return self._steps

    def finish(self, progress: bool = True) -> "TrainingRun":
        """Carry out all steps that are left, and return the run. `progress` prints a line every few
        seconds."""
        if not self.finished:
            steps = iter(self)
            self._screen = _screen() if progress else None
            if self._screen is not None and self._started is not None:  # shown from here on
                self._screen.show(self._started)
            for _ in steps:
                pass
        return self

    def close(self) -> None:
        """Stop in the middle: the last step is saved. Iterating again, or `finish()`, goes on."""
        self._unused.detach()
        if self._steps is not None:
            self._steps.close()

    def _was_taken_over(self) -> bool:
        """Whether this run was under way, and another object of this process has resumed it."""
        return self._events is not None and self._events not in _OPEN.values()

    def _advance(self) -> Generator[Progress, None, None]:
        """Carry out the run, or resume it; yield its steps."""
        execution = self._execution()
        if execution is None:
            self.finished = True
            return
        self._folder = execution.folder.path
        interruption = Interruption(self.settings.config.run.max_minutes)
        config, folder = self.settings.config, self._folder
        keep_freed_memory(sharded=bool(config.launch.shard))
        share_one_heap()
        open_group = lambda job, path: open_workers(config, job, path, None)  # noqa: E731
        self._events = events = execution.events(open_group, interruption)
        atexit.register(events.close)  # a run that the program leaves is saved, too
        _OPEN[folder.resolve()] = events
        try:
            with logging_to(folder / "run.log"):
                while True:
                    with interruption:  # not while the code of the caller runs
                        event = next(events, None)
                    if event is None and self._was_taken_over():
                        raise QuartetError(
                            f"{folder}: another object of this process has resumed this run. "
                            "Iterate over this one again, or call finish(), to take it back."
                        )
                    if event is None:
                        break
                    self._see(event)
                    if isinstance(event, Advanced):
                        yield event.progress
        except Interrupted as reason:
            raise RunInterrupted(
                f"{reason.in_words()}; go on with run.finish(), or "
                f'quartet.train(resume="{folder}").'
            ) from None
        finally:
            self._steps = self._started = self._events = None
            events.close()
            atexit.unregister(events.close)
            if _OPEN.get(folder.resolve()) is events:  # another object may have taken the run over
                del _OPEN[folder.resolve()]
            if self._screen is not None:
                self._screen.close()
            self._screen = None
        self.finished, self.stage = True, None
        write_report(folder)
        interruption.pass_on()

    def _execution(self) -> Execution | None:
        """Begin the run, or resume it where it has a folder already. None if it is done."""
        for thread in left_behind():  # by an interruption: it has the models of then
            thread.join()
        if self._folder is None:
            return begin(self.settings, self.job)
        if (path := self._folder.resolve()) in _OPEN:  # by another object, left in the middle
            _OPEN[path].close()
        folder = open_folder(self._folder)
        try:
            return resume(folder, self.settings, self.job, None, self.accept)
        except AlreadyDone:
            return None
        except CannotResume as error:
            words = re.sub(r"--accept ([^\s,:]+)", r'accept=["\1"]', str(error))
            raise CannotResume(words) from None

    def _see(self, event: Any) -> None:
        """Keep what an event says, and show it where there is a screen. Without one, warnings go
        to standard error."""
        if isinstance(event, Started):
            self.stage, self._started = event.stage.name, event
        elif isinstance(event, Advanced) and self._started is not None:
            self._started = dataclasses.replace(self._started, done=event.progress.number)
        elif isinstance(event, Finished):
            self.summaries[event.stage.name] = event.summary
        elif isinstance(event, Warned):
            self.warnings.append(f"{where(event.stage.name, event.step)}: {event.sentence}")
            if self._screen is None:
                print(f"▲ {self.warnings[-1]}", file=sys.stderr)
        elif isinstance(event, Noted):
            self.notes.append(event.sentence)
        if self._screen is not None and isinstance(event, Event):
            self._screen.show(event)

    @property
    def record(self) -> Run:
        """The run folder, read: `metrics`, `rollouts(step)`, `figure(name)`."""
        return Run(self.folder)

    @property
    def report(self) -> Path | None:
        """The report, one HTML file; None before the run is finished."""
        path = None if self._folder is None else self._folder / "report.html"
        return path if path is not None and path.is_file() else None

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.job.tokenizer

    @property
    def policy(self) -> Any:
        """The trained policy, a model of transformers, loaded from the run folder, in the precision
        of the run's policy. The folder has it in float32."""
        from quartet.models.language_model import load_model

        with no_progress_bars():
            model = load_model(self._result(*POLICIES), self.job.device)
        # Frozen weights are converted. A run that is given the model trains all of them.
        return compute_in(freeze(model), self._dtype("policy")).requires_grad_(True)

    @property
    def reward_model(self) -> Any:
        """The trained reward model, a `quartet.ScalarModel`, loaded from the run folder: frozen,
        and in the precision of the run's. Of an ensemble it is the first member."""
        from quartet.models.text_classifier import load_scorer

        with no_progress_bars():
            scalar = load_scorer(self._result("reward_model", "reward_model-1"), self.job.device)
        return freeze(scalar).compute_in(self._dtype("reward_model"))

    def _dtype(self, role: Role) -> Any:
        return dtype_of(self.settings.config.run.precision_of(role), self.job.device)

    def _result(self, *names: str) -> Path:
        folder = self.folder
        for name in names:
            if (folder / name).is_dir():
                return folder / name
        known = (*POLICIES, "reward_model", "reward_model-1")
        results = [name for name in known if (folder / name).is_dir()]
        if self.finished:
            raise QuartetError(
                f"{folder}: this run leaves no {names[0]}, only {', '.join(results) or 'a record'}."
            )
        from quartet.assembly.checkpoint_models import with_weights

        words = f"{folder}: has no {names[0]} yet. Call run.finish() first"
        if written := with_weights(folder):
            words += (
                f", or take that of a checkpoint: quartet export {typed(folder)} --to FOLDER "
                f"--checkpoint {written[0].name}"
            )
        raise QuartetError(f"{words}.")

    @property
    def folder(self) -> Path:
        """The run folder. Raises `QuartetError` before the first step is asked for."""
        self._unused.detach()
        if self._folder is None:
            raise QuartetError("the run has not begun: iterate over it, or call run.finish().")
        return self._folder

    def __fspath__(self) -> str:
        """Return the run folder: a run stands for it wherever a path is wanted."""
        return str(self.folder)

    def __repr__(self) -> str:
        self._unused.detach()
        recipe = " → ".join(self.settings.config.recipe)
        if self._folder is None:
            return f"<quartet run {recipe}, not begun>"
        state = "done" if self.finished else "not finished"
        return f"<quartet run {recipe}, {state}, {self._folder}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the state of the run and its main figure."""
        text = f"<code>{html.escape(repr(self))}</code>"
        if self._folder is None:
            return text
        from quartet.api.notebook import figures

        return text + figures(self.record)


def _was_not_begun() -> None:
    """Warn of a run that is gone without a use, as Python does of a coroutine."""
    words = "quartet.train made a run that was not begun: iterate over it, or call finish()."
    warnings.warn(words, RuntimeWarning, stacklevel=3)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a list of tables is one value per table."""
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, plain(value)


def _screen() -> Any:
    from quartet.cli.common import console
    from quartet.cli.screen import Screen

    return Screen(console)
