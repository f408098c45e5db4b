"""Carrying out a sweep: which run is next, when one is pruned, and what is recorded of it.

Everything is decided from the record and the run folders, so a sweep that was killed goes on where
it was: settings that were suggested are not suggested again, runs that ended are not run again, and
the others go on from their checkpoints.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from quartet.errors import QuartetError
from quartet.runs.folders import find_run
from quartet.runs.reader import NoRun, Run
from quartet.runs.rules import INVARIANTS
from quartet.runs.sweeps import EVALUATED, Sweep, Trial, TrialRun, curve, measured
from quartet.runs.untrusted import shown
from quartet.runs.wording import where
from quartet.sweeps.folder import CONFIG, OUTPUT, SweepFolder
from quartet.sweeps.processes import Processes, stop
from quartet.sweeps.request import ONCE, SweepRequest
from quartet.sweeps.suggest import first_pruned, suggest

if TYPE_CHECKING:
    from quartet.sweeps.on_ray import RayProcesses, RayRun

POLL_SECONDS = 0.2
REFUSED = 2
"""The exit code of a run whose request is wrong."""
DISTANCES = ("held_out_kl", "kl")
"""Measures that are recorded of every run, for the chart of the objective against the KL."""


class SweepFailed(QuartetError, RuntimeError):
    """A sweep that cannot go on: one sentence."""


@dataclass
class ActiveRun:
    """A run that is under way."""

    name: str
    process: "Popen[bytes] | RayRun"
    trial: int | None
    """None for the run whose stages run once."""
    seed: int
    run: Run | None = None
    judged: int = 0
    """The last step at which it was judged whether to prune it."""
    pruned: dict[str, Any] | None = None
    """What was recorded when it was pruned."""


@dataclass(frozen=True)
class Change:
    """Something that happened in a sweep."""

    kind: str
    """"started" or "ended"."""
    name: str
    trial: Trial | None
    run: TrialRun | None


@dataclass
class Conductor:
    """Carries out one sweep in its folder."""

    request: SweepRequest
    folder: SweepFolder
    processes: "Processes | RayProcesses"
    directory: Path
    """The folder that runs are started in: relative paths of the config begin there."""
    sweep: Sweep = field(init=False)
    jobs: list[ActiveRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sweep = Sweep(self.folder.path)
        self._again = {
            (trial.number, run.seed)
            for trial in self.sweep.trials.values()
            for run in trial.runs.values()
            if run.state == "failed"
        }

    def changes(self, check: Callable[[], None]) -> Generator[Change, None, None]:
        """Carry out what is left; yield each change when it is recorded. `check` is called often
        and may raise. Raises `SweepFailed` where no trial can be run as the sweep is written."""
        if self.request.spec.once:
            yield from self._run_once(check)
        while True:
            while len(self.jobs) < self.request.spec.parallel and (due := self._next()) is not None:
                yield self._start(*due)
            if not self.jobs:
                break
            yield from self._look()
            check()
            time.sleep(POLL_SECONDS)
        if self.sweep.status != "done":
            self._record("done")

    def close(self) -> None:
        """Stop all runs that are under way, which save what they have, and record that the sweep
        was stopped if it is not done."""
        self.processes.close()
        if self.sweep.status == "running":
            with contextlib.suppress(OSError):  # a full disk may be the reason
                self._record("stopped")
        self.folder.close()

    # --- the stages that run once

    def _run_once(self, check: Callable[[], None]) -> Iterator[Change]:
        """Run the first stages, unless that is done."""
        path = find_run(self.folder.path, ONCE)
        if path is not None and Run(path).status == "done":
            return
        job = ActiveRun(ONCE, self._process(ONCE, self.request.once_words()), None, 0)
        self.jobs = [job]
        yield Change("started", ONCE, None, None)
        while (code := job.process.poll()) is None:
            self._refresh(job)
            check()
            time.sleep(POLL_SECONDS)
        self.jobs = []
        if code != 0:
            self._refresh(job)
            raise SweepFailed(f"the stages that run once failed: {self._reason(job, code)}")
        yield Change("ended", ONCE, None, None)

    def _once(self) -> str:
        path = find_run(self.folder.path, ONCE) if self.request.spec.once else None
        return ONCE if path is None else self._written(path)

    def _written(self, path: Path) -> str:
        """Return a path as it is written into a config: relative where it is below the folder that
        runs are started in."""
        inside = path.is_relative_to(self.directory)
        return str(path.relative_to(self.directory) if inside else path)

    # --- trials

    def _next(self) -> tuple[Trial, int] | None:
        """Return the trial and seed that are run next; None where nothing can be started now."""
        busy = {(job.trial, job.seed) for job in self.jobs}
        for trial in self.sweep.trials.values():
            for seed in self._due(trial):
                if (trial.number, seed) not in busy:
                    return trial, seed
        number = len(self.sweep.trials)
        if number >= self.request.spec.num_trials:
            return None
        before = list(self.sweep.trials.values())
        values = suggest(self.request.spec, self.request.base.config.seed, number, before)
        self._record("suggested", trial=number, values=values)
        trial = self.sweep.trials[number]
        return trial, next(iter(trial.runs))

    def _due(self, trial: Trial) -> list[int]:
        """Return the seeds of a trial whose run is not ended. Where trials are pruned, the first
        seed decides whether the others are run. A run that failed before the sweep was resumed is
        tried once more."""
        runs = list(trial.runs.values())
        ended = [r for r in runs if r.state in {"pruned", "failed"}]
        if any((trial.number, r.seed) not in self._again for r in ended):
            return []
        due = [r.seed for r in runs if r.state != "done"]
        decides = self.request.spec.prune is not None and runs[0].seed in due
        return due[:1] if decides else due

    def _start(self, trial: Trial, seed: int) -> Change:
        name = f"trial-{trial.number:03d}-seed-{seed}"
        words = self.request.trial_words(trial.values, seed, self._once())
        self._again.discard((trial.number, seed))
        self._record("started", trial=trial.number, seed=seed)
        self.jobs.append(ActiveRun(name, self._process(name, words), trial.number, seed))
        return self._change("started", self.jobs[-1])

    def _process(self, name: str, words: list[str]) -> "Popen[bytes] | RayRun":
        place = [f'run.folder="{self._written(self.folder.path)}"', f'run.name="{name}"']
        command = ["run", self._written(self.folder.path / CONFIG), *words, *place, "--resume"]
        output = self.folder.path / OUTPUT / f"{name}.log"
        return self.processes.start(command, self.directory, output)

    def _look(self) -> Iterator[Change]:
        """Read what the runs have written, prune, and conclude those that have ended."""
        for job in list(self.jobs):
            code = job.process.poll()  # before the record is read, which is whole then
            self._refresh(job)
            if job.pruned is None and (verdict := self._verdict(job)) is not None:
                job.pruned = verdict
                self._end(job, "pruned", **verdict)
                stop(job.process)
                yield self._change("ended", job)
            if code is None:
                continue
            self.jobs.remove(job)
            if job.pruned is None:
                self._conclude(job, code)
                yield self._change("ended", job)
                self._stop_where_none_can_work(job, code)

    def _refresh(self, job: ActiveRun) -> None:
        try:
            if job.run is None:
                path = find_run(self.folder.path, job.name)
                job.run = None if path is None else Run(path)
            else:
                job.run.refresh()
        except NoRun:  # it is being written
            job.run = None

    def _verdict(self, job: ActiveRun) -> dict[str, Any] | None:
        """Return why a run is pruned: a finding of the doctor, or the median of the trials before
        it; None where it is not."""
        if job.run is None:
            return None
        rules = {*self.request.spec.stop_on, *INVARIANTS}
        for warning in job.run.warnings:
            if warning.get("rule") in rules:
                step, rule = warning["step"], str(warning["rule"])
                sentence = f"{where(warning['stage'], step)}: {warning['sentence']}"
                points = curve(job.run, self.request.spec.objective)
                return {"by": rule, "reason": sentence, "curve": points}
        spec, trial = self.request.spec, self.sweep.trials[job.trial or 0]
        if spec.prune is None or job.seed != next(iter(trial.runs)):
            return None
        points = curve(job.run, spec.objective)
        others = [t for t in self.sweep.trials.values() if t.number != trial.number]
        step = first_pruned(spec, others, points, job.judged)
        if step is None:
            job.judged = points[-1][0] if points else 0
            return None
        return {
            "by": "median",
            "reason": f"step {step}: worse than the median of the trials before it",
            "curve": [point for point in points if point[0] <= step],
        }

    def _conclude(self, job: ActiveRun, code: int) -> None:
        """Record how a run has ended."""
        if code != 0 or job.run is None:
            self._end(job, "failed", reason=self._reason(job, code))
            return
        spec = self.request.spec
        value = measured(job.run, spec.objective)
        found = {n: measured(job.run, n) for n in dict.fromkeys([*spec.at_most, *DISTANCES])}
        measures = {name: number for name, number in found.items() if number is not None}
        missing = [name for name in spec.at_most if name not in measures]
        if value is None or missing:
            name = spec.objective if value is None else missing[0]
            self._end(job, "failed", reason=f'the run recorded no "{name}".')
            return
        points = curve(job.run, spec.objective) if spec.prune is not None else []
        self._end(job, "done", objective=value, measures=measures, curve=points)

    def _end(self, job: ActiveRun, state: str, **facts: Any) -> None:
        run = None if job.run is None else job.run.path.name
        self._record("ended", trial=job.trial, seed=job.seed, state=state, run=run, **facts)
        assert self.sweep.trials[job.trial or 0].runs[job.seed].state == state  # or it runs again

    def _reason(self, job: ActiveRun, code: int) -> str:
        """Return why a run failed: what it recorded, or the last line that it printed."""
        failed = [e for e in job.run.events if e["event"] == "failed"] if job.run else []
        if failed and code == 1:
            return str(failed[-1]["error"])
        output = self.folder.path / OUTPUT / f"{job.name}.log"
        lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last or f"it ended with code {code}; see {output}."

    def _stop_where_none_can_work(self, job: ActiveRun, code: int) -> None:
        """Raise `SweepFailed` where a run failed in a way that every other run would: its request
        was refused, or it recorded no objective, and no run is done."""
        trials = self.sweep.trials.values()
        run = self.sweep.trials[job.trial or 0].runs[job.seed]
        if run.state != "failed" or any(trial.objectives for trial in trials):
            return
        if code == 0:
            names = sorted(
                {n for s in (job.run.series if job.run else {}).values() for n in s.columns}
            )
            raise SweepFailed(
                f"{job.name}: {run.reason} It recorded {shown(', '.join([*EVALUATED, *names]))}. "
                "docs/sweeps.md says what an objective can be."
            )
        if code == REFUSED:
            raise SweepFailed(f"{job.name} cannot be run: {run.reason}")

    def _record(self, kind: str, **facts: Any) -> None:
        self.folder.event(kind, **facts)
        self.sweep.refresh()

    def _change(self, kind: str, job: ActiveRun) -> Change:
        trial = self.sweep.trials[job.trial or 0]
        return Change(kind, job.name, trial, trial.runs[job.seed])


def facts_of(request: SweepRequest, directory: Path) -> Mapping[str, Any]:
    """Return the first line of a sweep's record."""
    spec = request.spec
    return {
        "objective": spec.objective,
        "direction": spec.direction,
        "method": spec.method,
        "keys": list(spec.keys),
        "trials": spec.num_trials,
        "seeds": list(request.seeds),
        "at_most": dict(spec.at_most),
        "identity": request.identity,
        "words": list(request.words),
        "directory": str(directory),
    }
