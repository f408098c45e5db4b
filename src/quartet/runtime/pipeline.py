"""A run: stages one after the other, from checkpoint to checkpoint, and a record of everything on
the way."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet import files as durable
from quartet.algorithms.policy_loss import PolicyLoss
from quartet.errors import NonFinite, QuartetError
from quartet.loops.progress import Progress
from quartet.loops.rl import Step
from quartet.recording.metric import Metric, measured, rule_of
from quartet.recording.model_card import write_cards
from quartet.recording.run_folder import RunFolder
from quartet.recording.step_recorder import InvariantBroken, StepRecorder
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import Tracking
from quartet.runs.doctor import RULES, Watch
from quartet.runtime.interruption import Interrupted, Interruption, always
from quartet.runtime.machine import give_back_memory
from quartet.runtime.worker import LocalWorkers, StepResult, Worker, WorkerGroup, WorkerLost
from quartet.stages.kinds import kind_of
from quartet.stages.protocol import Stage, Summary
from quartet.stages.rl import RLStage
from quartet.training.checkpoint import Checkpoint
from quartet.training.checkpoints import Checkpoints

QUOTED = 300
"""Characters of a sample that a message shows."""
SHARE = 0.02
"""Left to itself, a run spends no more of its time on checkpoints …"""
PAUSE = 10.0
"""… and writes none within so many seconds of the last."""


@dataclass(frozen=True)
class Started:
    stage: Stage
    number: int
    of: int
    done: int = 0
    """Steps that were done before the run was resumed."""
    earlier: Sequence[Mapping[str, float]] = ()
    """The metrics of those steps."""


@dataclass(frozen=True)
class Advanced:
    stage: Stage
    progress: Progress


@dataclass(frozen=True)
class Warned:
    stage: Stage
    step: int
    sentence: str


@dataclass(frozen=True)
class Finished:
    stage: Stage
    summary: Summary
    seconds: float


Event = Started | Advanced | Warned | Finished


class StageFailed(QuartetError, RuntimeError):
    """A stage that could not go on: its name, the step, and the cause."""


@dataclass(frozen=True)
class Saving:
    """What of a run is written down, and how often."""

    rollouts_every: int = 1
    every: int | None = None
    """Steps between checkpoints; None: as often as costs little."""
    last: int = 2
    best: str | None = None
    """The metric, with "-" before it where less is better, by which one more checkpoint is kept."""
    rollbacks: int = 0
    """How often a stage may go back to its last checkpoint, with half the learning rate, where a
    number is not finite."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """What a resumed run must have in common with this one."""
    metrics: Sequence[Metric] = ()
    """The user's own metrics of RL steps."""


@dataclass
class Pace:
    """When the next checkpoint is due."""

    every: int | None
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def due(self, step: int, steps: int) -> bool:
        if step == steps or self.every is not None:
            return step == steps or step % (self.every or 1) == 0
        return time.monotonic() - self.last > max(PAUSE, self.took / SHARE)

    def written(self, began: float) -> float:
        self.last = time.monotonic()
        self.took = self.last - began
        return round(self.took, 4)


class Pipeline:
    """One run of some stages. Iterate over `run()`; everything is in the run folder before it is
    yielded."""

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: RunFolder,
        texts: TokenTexts,
        saving: Saving = Saving(),
        tracking: Tracking | None = None,
        interruption: Interruption | None = None,
        strict: bool = True,
    ) -> None:
        """`strict`: stop where an invariant of the doctor's does not hold."""
        self.stages, self.folder, self.texts, self.saving, self.tracking = (
            stages,
            folder,
            texts,
            saving,
            tracking,
        )
        self.interruption, self.strict = interruption or Interruption(), strict
        places = {stage.name: place for place, stage in enumerate(stages)}
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints", places, saving.last, saving.best is not None
        )
        self.workers: WorkerGroup = LocalWorkers(Worker(stages, folder.path))
        self._is_latest = False
        self._failed_metrics: set[str] = set()
        self.results: dict[str, Any] = {}
        """Fingerprints of what finished stages left."""

    def run(
        self, since: Checkpoint | None = None, workers: WorkerGroup | None = None
    ) -> Iterator[Event]:
        """Run the stages from the beginning, or on from a checkpoint. `workers` do the work;
        without them this process does it alone."""
        self.workers = workers or self.workers
        first = 0 if since is None else self.checkpoints.stages[since.facts["stage"]]
        for number, stage in enumerate(self.stages[first:], first + 1):
            yield from self._stage(stage, number, since if number == first + 1 else None)
            give_back_memory()
        self._write_cards()

    def cut_back(self, since: Checkpoint) -> None:
        """Cut the record back to what the checkpoint knows of, and to the event that says that the
        checkpoint was written: no step is in it twice."""
        stage, step = since.facts["stage"], since.facts["step"]
        place = self.checkpoints.stages[stage]
        makes_rollouts = next(
            (i for i, one in enumerate(self.stages) if isinstance(one, RLStage)), place
        )
        last = step if makes_rollouts == place else None if makes_rollouts < place else -1
        seconds = self._seconds_of(since.name)
        self.folder.cut_back(since.facts["events"]["size"], last)
        if step:
            self.folder.event("checkpoint", stage, step, name=since.name, seconds=seconds)

    def _seconds_of(self, checkpoint: str) -> float | None:
        """How long it took to write; None where a kill came before that was in the record."""
        events = self.folder.record().events
        seconds = [
            e.get("seconds")
            for e in events
            if e["event"] == "checkpoint" and e.get("name") == checkpoint
        ]
        return seconds[-1] if seconds and isinstance(seconds[-1], float) else None

    def _write_cards(self) -> None:
        """Of a record that was damaged and accepted as it is no card can be made: the run is done
        all the same."""
        try:
            write_cards(self.folder.path)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            self.folder.event(
                "note",
                sentence="The model cards could not be written: the record is damaged "
                f"({error!r}).",
            )

    def _stage(self, stage: Stage, number: int, since: Checkpoint | None) -> Iterator[Event]:
        """One stage, from its beginning or from a checkpoint of it."""
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
            resumable = self.workers.call(
                "begin", stage.name, None if since is None else str(since.path)
            )[0]
        yield from self._advance(stage, step, resumable)
        with self._failing(f"{stage.title}, at its end"), self.interruption.only_if(always):
            summary = self.workers.call("finish")[0]
        self.results |= self._left(stage)
        took = round(time.monotonic() - started, 2)
        self.folder.event("finished", stage.name, summary=summary, seconds=took)
        yield Finished(stage, summary, took)

    def _describe(self, stage: Stage) -> None:
        """Record what readers must know of an RL stage's parts, which they cannot import: how its
        loss clips, and the user's own metrics. A resumed stage records it again where it has
        changed."""
        if not isinstance(stage, RLStage):
            return
        described: dict[str, Any] = {
            "clip": clip_bounds(stage.algorithm.policy_loss),
            "metrics": [dataclasses.asdict(metric.definition) for metric in self.saving.metrics],
        }
        before = [e for e in self.folder.record().events if e["event"] == "definitions"]
        if not before or any(before[-1].get(key) != value for key, value in described.items()):
            self.folder.event("definitions", stage.name, **described)

    @contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Whatever it is, the run says which stage it was in."""
        try:
            yield
        except WorkerLost:
            raise
        except Exception as error:
            raise StageFailed(f"{where}: {error}") from error

    def _recorder(self, stage: Stage) -> StepRecorder:
        """Return the recorder of a stage's steps, which has seen those that are in the record."""
        is_rl = isinstance(stage, RLStage)
        own = {rule_of(metric): 1 for metric in self.saving.metrics} if is_rl else {}
        filtered = isinstance(stage, RLStage) and stage.sampling.filters
        watch = Watch(kl_target(stage), filtered, {**RULES, **own})
        return StepRecorder(
            self.folder,
            stage.name,
            self.texts,
            watch,
            self.saving.rollouts_every,
            self.tracking,
            self.strict,
        )

    def _back(self, stage: Stage, step: int, cause: str) -> tuple[int, str]:
        """Go back to the last checkpoint of the stage, from the step after `step`, with half the
        learning rate. Return the checkpoint's step, and a sentence about it. It is written again,
        so that a run that is resumed from it goes on with half too.

        Raises `StageFailed` where that is not wanted, cannot help, was done often enough, or there
        is no checkpoint.
        """
        failed = f"{stage.title}, {cause}"
        untouched = (
            step == 0 and self.workers.untouched()
        )  # asked first: with several ranks it is about the last call
        scale, rollbacks = self.workers.call("scale")[0], self.saving.rollbacks
        if rollbacks == 0 or scale == 0:  # not wanted, or nothing learns
            raise StageFailed(failed)
        if untouched:
            raise StageFailed(
                f"{failed}. Going back (run.rollbacks) cannot help, because nothing has been "
                f"learnt yet: look at the data, the "
                "rewards and the model that the stage starts from."
            )
        if scale <= 0.5**rollbacks:
            raise StageFailed(
                f"{failed}. The stage was rolled back {rollbacks} time{'s' * (rollbacks != 1)} "
                f"(run.rollbacks), with the "
                f"learning rates × {scale:g} at last: lower them, or find out what the numbers "
                f"have in common."
            )
        found = next(
            (c for _, c in self.checkpoints.usable(lambda _: None) if isinstance(c, Checkpoint)),
            None,
        )
        if found is None or found.facts["stage"] != stage.name:
            raise StageFailed(
                f"{failed}. It cannot be rolled back (run.rollbacks), because no checkpoint of "
                f"this stage can be used."
            )
        self.workers.call("go_back", str(found.path), scale / 2)
        self.cut_back(found)
        step, sentence = (
            found.facts["step"],
            f"rolled back to {found.name}, learning rates × {scale / 2:g}, because of {cause}",
        )
        self.folder.event("warning", stage.name, step, rule="rolled_back", sentence=sentence)
        self._save(stage.name, step, found.facts["merit"])
        return step, sentence

    def _advance(self, stage: Stage, step: int, resumable: bool) -> Iterator[Event]:
        """All steps of a stage that are still to do."""
        pace, merits = Pace(self.saving.every), _Mean()
        recorder = self._recorder(stage)
        while True:
            before = time.monotonic()
            try:
                with self._failing(f"{stage.title}, step {step + 1}"):
                    stepped = self._step()
            except Interrupted:
                if (
                    self.workers.untouched() and step and resumable
                ):  # a second signal may find the weights half way
                    self._checkpoint(stage, step, merits, pace)
                raise
            except StageFailed as failure:
                if not isinstance(failure.__cause__, NonFinite):
                    raise
                cause = (
                    f"step {step + 1}: {failure.__cause__}{self._quoted(failure.__cause__.tokens)}"
                )
                try:
                    step, sentence = self._back(stage, step, cause)
                except StageFailed as final:
                    raise final from failure.__cause__
                recorder = self._recorder(stage)
                yield Warned(stage, step, sentence)
                continue
            if stepped.progress is None:
                return
            progress, took = stepped.progress, round(time.monotonic() - before, 4)
            step, notes = progress.number, [("memory", sentence) for sentence in stepped.notes]
            if isinstance(progress, Step) and self.saving.metrics:
                progress, failures = measured(progress, self.saving.metrics, self._failed_metrics)
                notes += failures
            warnings = self._record(stage, progress, notes, took, recorder)
            merits.see(progress.metrics, self.saving.best)
            if resumable and pace.due(step, stage.num_steps):
                self._checkpoint(stage, step, merits, pace)
            yield Advanced(stage, progress)
            yield from warnings

    def _step(self) -> StepResult:
        with self.interruption.only_if(self.workers.untouched):
            stepped: StepResult = self.workers.call("step")[0]
        return stepped

    def _quoted(self, tokens: Sequence[int]) -> str:
        """What a sample says, for a sentence about it."""
        text = "".join(self.texts[token] for token in tokens)
        return f': "{text[:QUOTED]}{"…" if len(text) > QUOTED else ""}"' if tokens else ""

    def _record(
        self,
        stage: Stage,
        progress: Progress,
        notes: Sequence[tuple[str, str]],
        seconds: float,
        recorder: StepRecorder,
    ) -> list[Warned]:
        """Record one step; return what there is to warn of."""
        number = progress.number
        try:
            sentences = recorder.record(progress, seconds, notes)
        except InvariantBroken as error:
            raise StageFailed(
                f"{stage.title}, step {number}: {error} Nothing of this step is saved."
            ) from error
        finally:
            if not self._is_latest:
                self.folder.become_latest()
                self._is_latest = True
        return [Warned(stage, number, sentence) for sentence in sentences]

    def _checkpoint(self, stage: Stage, step: int, merits: "_Mean", pace: Pace) -> None:
        began = time.monotonic()
        written = self._save(stage.name, step, merits.taken())
        self.folder.event(
            "checkpoint", stage.name, step, name=written.name, seconds=pace.written(began)
        )

    def _save(self, stage: str, step: int, merit: float | None = None) -> Path:
        """The record is on the disk before the checkpoint that says how far it goes."""
        facts = {
            "events": self.folder.sync(),
            "stages": list(self.checkpoints.stages),
            "results": self.results,
            "steps": {s.name: s.num_steps for s in self.stages[: self.checkpoints.stages[stage]]},
            "merit": merit,
            **self.saving.made_with,
        }
        try:
            return self.checkpoints.write(
                stage, step, lambda folder: self.workers.call("save", str(folder))[0], facts
            )
        except OSError as error:
            there = next(
                (f"The last good one is {path.name}." for path in self.checkpoints.newest_first()),
                "There is none yet.",
            )
            size = sum(self.workers.call("size"))
            reason = f"{error.strerror or error}; it needs {size / 1e6:,.1f} MB"
            raise StageFailed(
                f"checkpoint {stage}-{step:06d} could not be written ({reason}). {there}"
            ) from error

    def _left(self, stage: Stage) -> dict[str, Any]:
        """Fingerprints of what a stage has left for others; it is on the disk then."""
        found: dict[str, Any] = {}
        kind = kind_of(stage.name)
        for name in () if kind is None else kind.results:
            if (self.folder.path / name).is_dir():
                found |= durable.fingerprints(self.folder.path, self.folder.path / name)
        paths = [self.folder.path / name for name in found]
        for path in (*paths, *{path.parent for path in paths}):
            durable.sync(path)
        return found


class _Mean:
    """Of a metric, since it was last taken."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def see(self, metrics: Mapping[str, float], name: str | None) -> None:
        if name is not None and name.removeprefix("-") in metrics:
            self.seen.append(metrics[name.removeprefix("-")] * (-1 if name.startswith("-") else 1))

    def taken(self) -> float | None:
        mean = sum(self.seen) / len(self.seen) if self.seen else None
        self.seen = []
        return mean


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
