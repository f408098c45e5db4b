"""The record of a stage's steps: metrics, rollouts, trackers, and what the doctor finds."""

from collections.abc import Iterable, Mapping
from typing import Any

from quartet.errors import QuartetError
from quartet.loops.progress import Progress, Sampled
from quartet.recording.run_folder import Keeping, RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import Tracking
from quartet.runs.doctor import Watch
from quartet.runs.rules import INVARIANTS


class InvariantBroken(QuartetError, RuntimeError):
    """A step in which something does not hold that always must: the sentence of the doctor."""


class StepRecorder:
    """Writes the steps of one stage into a run folder, and lets the doctor see each."""

    def __init__(
        self,
        folder: RunFolder,
        stage: str,
        texts: TokenTexts,
        watch: Watch,
        rollouts_every: int = 1,
        tracking: Tracking | None = None,
        strict: bool = True,
    ) -> None:
        """Steps that are in the folder already are seen by the doctor first. `strict` stops at a
        broken invariant."""
        self.folder, self.stage, self.texts, self.watch = folder, stage, texts, watch
        self.tracking, self.strict = tracking, strict
        self.keeps_rollouts = Keeping(rollouts_every)
        self.last_step = 0
        for event in folder.metrics_of(stage):
            watch.see(event["metrics"])
            self.last_step = event["step"]
            self.keeps_rollouts(event["step"], event["metrics"])

    def record(
        self, progress: Progress, seconds: float, notes: Iterable[tuple[str, str]] = ()
    ) -> list[str]:
        """Record one step that took `seconds`. Return the sentences to warn of: `notes`, which are
        pairs of a rule and a sentence, and those of the trackers and the doctor.

        Raises `InvariantBroken` for a broken invariant if the recorder is strict; the step is in
        the record then, with the warning.
        """
        number, metrics = progress.number, progress.metrics
        self.last_step = number
        phases = progress.seconds or None
        self.folder.event(
            "metrics", self.stage, number, metrics=metrics, seconds=seconds, phases=phases
        )
        if isinstance(progress, Sampled) and self.keeps_rollouts(number, metrics):
            self.folder.write_rollouts(progress, self.texts)
        failures = self.tracking.log(self.stage, number, metrics) if self.tracking else []
        warnings = [*(("tracker", sentence) for sentence in failures), *notes]
        warnings += [(rule.__name__, sentence) for rule, sentence in self.watch.see(metrics)]
        for rule, sentence in warnings:
            self.folder.event("warning", self.stage, number, rule=rule, sentence=sentence)
            if self.strict and rule in INVARIANTS:
                raise InvariantBroken(sentence)
        return [sentence for _, sentence in warnings]

    def finish(self, summary: Mapping[str, Any]) -> list[str]:
        """Show the doctor the summary of the finished stage. Record and return the sentences of the
        rules that hold because of it; a stage without steps has none."""
        found = self.watch.finish(summary) if self.last_step else []
        for rule, sentence in found:
            self.folder.event(
                "warning", self.stage, self.last_step, rule=rule.__name__, sentence=sentence
            )
        return [sentence for _, sentence in found]
