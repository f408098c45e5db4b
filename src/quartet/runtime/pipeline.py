"""A run: its stages one after the other, from checkpoint to checkpoint, with a record of
everything."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quartet import files
from quartet.algorithms.policy_loss import PolicyLoss
from quartet.config.run import KEPT_STEPS
from quartet.errors import NonFinite, error_in_words
from quartet.io.activity import activity
from quartet.io.heap import return_freed_memory
from quartet.loops.progress import Progress
from quartet.loops.rl import Step
from quartet.recording.metric import measured, rule_of
from quartet.recording.model_card import write_cards
from quartet.recording.run_folder import RunFolder
from quartet.recording.step_recorder import InvariantBroken, StepRecorder
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import Tracking
from quartet.runs.doctor import Watch
from quartet.runs.history import TOLERANCES, Terms
from quartet.runs.rules import RULES
from quartet.runtime.events import Advanced, Event, Finished, StageFailed, Started, Warned
from quartet.runtime.interruption import Interrupted, Interruption, always
from quartet.runtime.saving import CheckpointTimer, RunningMean, Saving
from quartet.runtime.worker import LocalWorkers, StepResult, Worker, WorkerGroup, WorkerLost
from quartet.stages.kinds import kind_of
from quartet.stages.protocol import Stage
from quartet.stages.rl import RLStage
from quartet.stages.rounds import ONLY_ROUND
from quartet.training.checkpoint import Checkpoint
from quartet.training.checkpoints import Checkpoints

EXCERPT = 300
"""Characters of a sample that a message shows."""


@dataclass
class _Position:
    """How far a stage has come."""

    step: int
    """The last step that was finished and recorded."""
    timer: CheckpointTimer
    merit: RunningMean

    @property
    def unsaved_steps(self) -> int:
        """How many finished steps are in no checkpoint."""
        return self.step - self.timer.last_step

    def advance(self, progress: Progress) -> None:
        """Take account of a step that was recorded."""
        self.step = progress.number
        self.merit.add(progress.metrics)


class Pipeline:
    """Runs the stages of one run. Iterate over `run()`: an event is yielded when it is in the run
    folder."""

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: RunFolder,
        texts: TokenTexts,
        saving: Saving | None = None,
        tracking: Tracking | None = None,
        interruption: Interruption | None = None,
        strict: bool = True,
    ) -> None:
        """`strict` stops the run at a step in which an invariant of the doctor does not hold."""
        self.stages, self.folder, self.texts = stages, folder, texts
        self.saving, self.tracking = saving or Saving(), tracking
        self.interruption, self.strict = interruption or Interruption(), strict
        places = {stage.name: place for place, stage in enumerate(stages)}
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints", places, self.saving.last, self.saving.best is not None
        )
        self.workers: WorkerGroup = LocalWorkers(Worker(stages, folder.path))
        self._is_latest = False
        self._failed_metrics: set[str] = set()
        self.results: dict[str, Any] = {}
        """Fingerprints of the files that finished stages left for later ones."""

    def run(
        self, since: Checkpoint | None = None, workers: WorkerGroup | None = None
    ) -> Iterator[Event]:
        """Run the stages from the beginning, or from the checkpoint `since`. `workers` compute the
        steps; without them this process does."""
        self.workers = workers or self.workers
        first = 0 if since is None else self.checkpoints.stages[since.facts["stage"]]
        try:
            for number, stage in enumerate(self.stages[first:], first + 1):
                yield from self._stage(stage, number, since if number == first + 1 else None)
                return_freed_memory()
        finally:
            if workers is None:
                self.workers.close()
        self._write_cards()

    def cut_back(self, since: Checkpoint) -> None:
        """Remove from the record what came after a checkpoint, so that no step is in it twice. The
        event that the checkpoint was written stays."""
        stage, step = since.facts["stage"], since.facts["step"]
        place = self.checkpoints.stages[stage]
        # Of a stage that samples, later rollouts go; of those before all stay, of later ones none.
        last_rollouts = -1
        for number, one in enumerate(self.stages[: place + 1]):
            if getattr(one, "samples", False):
                first = getattr(one, "first_step", 0)
                last_rollouts = max(step, first) if number == place else one.num_steps
        seconds = self._seconds_of(since.name)
        self.folder.cut_back(since.facts["events"]["size"], last_rollouts)
        self.checkpoints.remove_superfluous(since.name)
        if step:
            self.folder.event("checkpoint", stage, step, name=since.name, seconds=seconds)

    def _seconds_of(self, checkpoint: str) -> float | None:
        """Return how long a checkpoint took to write; None if the run was killed before that was
        recorded."""
        events = self.folder.record().events
        seconds = [
            e.get("seconds")
            for e in events
            if e["event"] == "checkpoint" and e.get("name") == checkpoint
        ]
        return seconds[-1] if seconds and isinstance(seconds[-1], float) else None

    def _write_cards(self) -> None:
        """Write the model cards. If the record is damaged, which the user has accepted then, there
        may be none; the run is done all the same."""
        try:
            write_cards(self.folder.path)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            self.folder.event(
                "note",
                sentence="The model cards could not be written: the record is damaged "
                f"({error!r}).",
            )

    def _stage(self, stage: Stage, number: int, since: Checkpoint | None) -> Iterator[Event]:
        """Run one stage, from its beginning or from a checkpoint of it."""
        started, step = time.monotonic(), 0
        if since is None:
            self.folder.event("started", stage.name)
            self._save(stage.name, 0)
        else:
            step, self.results = since.facts["step"], since.facts["results"]
        self._describe(stage)
        earlier = [event["metrics"] for event in self.folder.metrics_of(stage.name)] if step else []
        yield Started(stage, number, len(self.stages), step, earlier)
        with self._failing(f"{stage.title}, before it began"), self.interruption.only_if(always):
            checkpoint = None if since is None else str(since.path)
            resumable = self.workers.call("begin", stage.name, checkpoint)[0]
        recorder = yield from self._advance(stage, step, resumable)
        with self._failing(f"{stage.title}, at its end"), self.interruption.only_if(always):
            summary = self.workers.call("finish")[0]
        with activity("syncing results"):
            self.results |= self._result_fingerprints(stage)
        seconds = round(time.monotonic() - started, 2)
        self.folder.event("finished", stage.name, summary=summary, seconds=seconds)
        yield Finished(stage, summary, seconds)
        for sentence in recorder.finish(summary):
            yield Warned(stage, recorder.last_step, sentence)

    def _describe(self, stage: Stage) -> None:
        """Record what readers must know of an RL stage's parts, which they cannot import: how its
        loss clips, and the user's own metrics. A resumed stage records it again where it has
        changed."""
        if not isinstance(stage, RLStage):
            return
        definitions: dict[str, Any] = {
            "clip": clip_bounds(stage.algorithm.policy_loss),
            "metrics": [dataclasses.asdict(metric.definition) for metric in self.saving.metrics],
            "rounding": stage.rounding,
        }
        earlier = [e for e in self.folder.record().events if e["event"] == "definitions"]
        if not earlier or any(earlier[-1].get(k) != value for k, value in definitions.items()):
            self.folder.event("definitions", stage.name, **definitions)

    @contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Turn any exception but `WorkerLost` into `StageFailed`, with the place in its message."""
        try:
            yield
        except WorkerLost:
            raise
        except Exception as error:
            raise StageFailed(f"{where}: {error_in_words(error)}") from error

    def _recorder(self, stage: Stage) -> StepRecorder:
        """Return the recorder of a stage's steps, which has seen those that are in the record."""
        is_rl = isinstance(stage, RLStage)
        own = {rule_of(metric): Terms(()) for metric in self.saving.metrics} if is_rl else {}
        sampling = stage.sampling if isinstance(stage, RLStage) else None
        filtered = sampling is not None and sampling.filters
        keep_mask = sampling is not None and sampling.keep_mask
        tolerance = TOLERANCES[stage.rounding if isinstance(stage, RLStage) else "fp32"]
        watch = Watch(
            kl_target(stage),
            filtered,
            tolerance,
            {**RULES, **own},
            keep_mask,
            getattr(stage, "starts_at_reference", True),
        )
        return StepRecorder(
            self.folder,
            stage.name,
            self.texts,
            watch,
            self.saving.rollouts_every or math.ceil(stage.num_steps / KEPT_STEPS),
            self.tracking,
            self.strict,
        )

    def _back(self, stage: Stage, step: int, cause: str) -> tuple[int, str]:
        """Go back to the last checkpoint of the stage, with half the learning rate. Return the
        checkpoint's step and a sentence about it. The checkpoint is written again, so that a run
        that is resumed from it has half the learning rate too.

        Raises `StageFailed` if rollbacks are off or used up, nothing has been learnt yet, or there
        is no checkpoint of the stage.
        """
        failed = f"{stage.title}, {cause}"
        # This comes first: with several ranks the answer is about the last call.
        untouched = step == 0 and self.workers.untouched()
        scale, rollbacks = self.workers.call("scale")[0], self.saving.rollbacks
        if rollbacks == 0 or scale == 0:  # not wanted, or nothing learns
            raise StageFailed(failed)
        if untouched:
            raise StageFailed(
                f"{failed}. Going back (run.rollbacks) cannot help, because nothing has been "
                "learnt yet: look at the data, the rewards and the model that the stage starts "
                "from."
            )
        if scale <= 0.5**rollbacks:
            raise StageFailed(
                f"{failed}. The stage was rolled back {rollbacks} time{'s' * (rollbacks != 1)} "
                f"(run.rollbacks), with the learning rates × {scale:g} at last: lower them, or "
                "find out what the numbers have in common."
            )
        usable = (c for _, c in self.checkpoints.usable(lambda _: None))
        checkpoint = next((c for c in usable if isinstance(c, Checkpoint)), None)
        if checkpoint is None or checkpoint.facts["stage"] != stage.name:
            raise StageFailed(
                f"{failed}. It cannot be rolled back (run.rollbacks), because no checkpoint of "
                "this stage can be used."
            )
        self.workers.call("go_back", str(checkpoint.path), scale / 2)
        self.cut_back(checkpoint)
        step = checkpoint.facts["step"]
        rates = f"learning rates × {scale / 2:g}"
        sentence = f"rolled back to {checkpoint.name}, {rates}, because of {cause}"
        self.folder.event("warning", stage.name, step, rule="rolled_back", sentence=sentence)
        self._save(stage.name, step, checkpoint.facts["merit"])
        return step, sentence

    def _advance(
        self, stage: Stage, step: int, resumable: bool
    ) -> Generator[Event, None, StepRecorder]:
        """Take all steps of a stage after `step`. `resumable` says whether it has any state. Return
        the recorder of the steps."""
        timer = CheckpointTimer(self.saving.every, last_step=step)
        at = _Position(step, timer, RunningMean(self.saving.best))
        recorder = self._recorder(stage)
        try:
            while True:
                before = time.monotonic()
                try:
                    with self._failing(f"{stage.title}, step {at.step + 1}"):
                        result = self._step(stage, at, resumable)
                except StageFailed as failure:
                    sentence = self._gone_back(stage, at, failure)
                    recorder = self._recorder(stage)
                    yield Warned(stage, at.step, sentence)
                    continue
                if result.progress is None:
                    return recorder
                seconds = round(time.monotonic() - before, 4)
                progress, warnings = self._record(stage, result, seconds, recorder)
                at.advance(progress)
                due = progress.is_last or at.timer.due(at.step, stage.num_steps)
                if resumable and due:
                    self._checkpoint(stage, at, progress.is_last)
                try:
                    yield Advanced(stage, progress)
                    yield from warnings
                except GeneratorExit:  # the caller has enough of it for now
                    if resumable and at.unsaved_steps:
                        self._checkpoint(stage, at)
                    raise
        except Interrupted as reason:
            reason.lost_steps = at.unsaved_steps if resumable else 0
            raise

    def _step(self, stage: Stage, at: "_Position", resumable: bool) -> StepResult:
        """Take a step. Where a signal ends it, save the step before if that is still in memory and
        a checkpoint can be written in the time that is left."""
        halt = partial(self.workers.halt, at.step)
        try:
            with self.interruption.only_if(halt):
                result: StepResult = self.workers.call("step")[0]
            return result
        except Interrupted:
            in_time = at.timer.duration < self.interruption.seconds_left()
            if resumable and at.unsaved_steps and in_time and halt():
                with contextlib.suppress(Interrupted), self.interruption.last_work():
                    self._checkpoint(stage, at)
            raise

    def _gone_back(self, stage: Stage, at: "_Position", failure: StageFailed) -> str:
        """Go back to the last checkpoint after a number that is not finite; return a sentence
        about it. Raises any other failure, and one after which no rollback is left."""
        error = failure.__cause__
        if not isinstance(error, NonFinite):
            raise failure
        cause = f"step {at.step + 1}: {error}{self._excerpt(error.tokens)}"
        try:
            step, sentence = self._back(stage, at.step, cause)
        except StageFailed as final:
            raise final from error
        at.step = at.timer.last_step = step
        return sentence

    def _excerpt(self, tokens: Sequence[int]) -> str:
        """Return the start of a sample's text, for the end of a sentence; nothing for no tokens."""
        text = "".join(self.texts[token] for token in tokens)
        return f': "{text[:EXCERPT]}{"…" if len(text) > EXCERPT else ""}"' if tokens else ""

    def _record(
        self, stage: Stage, result: StepResult, seconds: float, recorder: StepRecorder
    ) -> tuple[Progress, list[Warned]]:
        """Record one step. Return it with the user's own metrics, and what there is to warn of."""
        assert result.progress is not None
        progress, notes = result.progress, [("memory", sentence) for sentence in result.notes]
        if isinstance(progress, Step) and self.saving.metrics:
            progress, failures = measured(progress, self.saving.metrics, self._failed_metrics)
            notes += failures
        number = progress.number
        try:
            sentences = recorder.record(progress, seconds, notes)
        except InvariantBroken as error:
            self._become_latest()
            raise StageFailed(
                f"{stage.title}, step {number}: {error} Nothing of this step is saved."
            ) from error
        self._become_latest()
        return progress, [Warned(stage, number, sentence) for sentence in sentences]

    def _become_latest(self) -> None:
        """Let `runs/latest` be this run; it is once it has taken a step."""
        if not self._is_latest:
            self.folder.become_latest()
            self._is_latest = True

    def _checkpoint(self, stage: Stage, at: "_Position", ended: bool = False) -> None:
        """Write a checkpoint and record that. `ended` says that the stage ends before the number of
        steps that it was to take."""
        began = time.monotonic()
        path = self._save(stage.name, at.step, at.merit.take(), ended)
        seconds = at.timer.written(began, at.step)
        self.folder.event("checkpoint", stage.name, at.step, name=path.name, seconds=seconds)

    def _save(self, stage: str, step: int, merit: float | None = None, ended: bool = False) -> Path:
        """Write a checkpoint and return its folder. The record is on the disk before the checkpoint
        that says how long the record is."""
        facts = {
            "events": self.folder.sync(),
            "stages": list(self.checkpoints.stages),
            "results": self.results,
            "steps": {s.name: s.num_steps for s in self.stages[: self.checkpoints.stages[stage]]},
            "merit": merit,
            "ended": ended,
            **self.saving.made_with,
        }
        try:
            return self.checkpoints.write(
                stage, step, lambda folder: self.workers.call("save", str(folder))[0], facts
            )
        except OSError as error:
            last = next(iter(self.checkpoints.newest_first()), None)
            rest = "There is none yet." if last is None else f"The last good one is {last.name}."
            size = sum(self.workers.call("size"))
            reason = f"{error.strerror or error}; it needs {size / 1e6:,.1f} MB"
            raise StageFailed(
                f"checkpoint {stage}-{step:06d} could not be written ({reason}). {rest}"
            ) from error

    def _result_fingerprints(self, stage: Stage) -> dict[str, Any]:
        """Return the fingerprints of the files that a stage has left for later ones, once they are
        on the disk."""
        fingerprints: dict[str, Any] = {}
        kind = kind_of(stage.name)
        place = getattr(stage, "round", ONLY_ROUND).folder(self.folder.path)
        for name in () if kind is None else kind.folders(stage.name):
            if (place / name).is_dir():
                fingerprints |= files.fingerprints(self.folder.path, place / name)
        paths = [self.folder.path / name for name in fingerprints]
        for path in (*paths, *{path.parent for path in paths}):
            files.sync(path)
        return fingerprints


def clip_bounds(loss: PolicyLoss) -> dict[str, Any] | None:
    """Return over which ratios a loss keeps the gradient, without the bounds that are infinite;
    None where it does not say."""
    if loss.clip_range is None:
        return None
    bounds = dataclasses.asdict(loss.clip_range)
    return {name: value for name, value in bounds.items() if value != math.inf}


def kl_target(stage: Stage) -> float | None:
    """What the KL of an RL stage is held to, if it is."""
    controller = getattr(getattr(getattr(stage, "algorithm", None), "kl", None), "controller", None)
    return getattr(controller, "target", None)
