"""What a sweep would take, before anything is run."""

from dataclasses import dataclass
from typing import Any

from quartet.config.errors import toml_value
from quartet.config.tables import Config
from quartet.config.toml import settings_in
from quartet.planning.device import device_named
from quartet.planning.gpu_plan import plan_on
from quartet.sweeps.request import SweepRequest
from quartet.sweeps.suggest import suggest


@dataclass(frozen=True)
class SweepPlan:
    """The trials of a sweep, and the time of its runs on this machine."""

    trials: list[dict[str, Any]]
    """The values of each trial; empty where they are suggested as results come."""
    num_runs: int
    seconds: float | None
    """Of all runs, those whose stages run once among them; None where a model's size is unknown."""
    note: str

    def in_words(self) -> str:
        """Return the number of runs and their time."""
        if self.seconds is None:
            return f"{self.num_runs:,} runs; the time is not known, as a model's size is not"
        return f"{self.num_runs:,} runs · ≈ {_duration(self.seconds)} of this machine"


def plan_sweep(request: SweepRequest) -> SweepPlan:
    """Return the trials of a sweep, and what they take together. Runs at once share the cores, so
    their number does not change the time."""
    spec = request.spec
    numbers = range(0 if spec.method == "tpe" else spec.num_trials)
    trials = [suggest(spec, request.base.config.seed, number, ()) for number in numbers]
    first = {name: key.ends[0] for name, key in spec.keys.items()}
    times = [_seconds(request, values) for values in trials or [first]]
    known = [seconds for seconds in times if seconds is not None]
    num_runs = spec.num_trials * len(request.seeds)
    total = sum(known) / len(known) * num_runs if len(known) == len(times) else None
    if spec.once and total is not None:
        once = _once_seconds(request)
        total = total - once * num_runs + once
    notes = ["the trials are suggested as results come"] * (spec.method == "tpe")
    notes += ["pruned trials take less"] * bool(spec.prune or spec.stop_on)
    return SweepPlan(trials, num_runs + bool(spec.once), total, "; ".join(notes))


def _seconds(request: SweepRequest, values: dict[str, Any]) -> float | None:
    """Return the time of a trial with all stages of the recipe."""
    words = [f"{key}={toml_value(v)}" for key, v in request.spec.settings(values).items()]
    config = settings_in(request.file, [*request.words, *words]).config
    return _seconds_of(config)


def _once_seconds(request: SweepRequest) -> float:
    """Return the time of the stages that run once."""
    return _seconds_of(settings_in(request.file, request.once_words()).config) or 0.0


def _seconds_of(config: Config) -> float | None:
    """Return the time of a run on the device that it would take here."""
    return plan_on(config, device_named(config.run.device)).seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
