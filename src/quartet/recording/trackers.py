"""Trackers: other tools that a run sends its metrics to. The run folder always has all metrics."""

import contextlib
import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from quartet import files
from quartet.errors import QuartetError
from quartet.io.install import install_command

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

PROJECT = "quartet"
"""The name of the project or experiment in a tracker."""

KNOWN = "trackers.json"
"""The file of a run's folder that says which run each tracker has for it."""


class TrackerMissing(QuartetError, ValueError):
    """A tracker's package is not installed. The message is a sentence for the user."""


@runtime_checkable
class Sink(Protocol):
    """A tracker's interface. An exception in it does not end the run."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of Trackio. TRACKIO_DIR sets where it stores its data."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(
            {f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}}
        )

    def close(self) -> None:
        self._run.finish()


class WandB(Trackio):
    """A run of Weights & Biases, whose interface Trackio has. WANDB_MODE=offline keeps its data in
    the run's folder. Its charts have the steps of their stage on the x axis."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        super().log(stage, step, metrics)


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI, or its default store."""

    def __init__(self, run: str, client: Any) -> None:
        self._id, self._client = run, client

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # Its file store makes a file of each name and a folder of each slash: reward/gold
            # cannot stand beside reward.
            self._client.log_metric(self._id, f"{stage}/{name.replace('/', '.')}", value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Tracking:
    """All trackers of a run. A tracker that fails gets no more metrics, and is reported once."""

    def __init__(self, names: Sequence[Tracker], folder: Path, config: Mapping[str, Any]) -> None:
        self._sinks: dict[str, Sink] = {}
        self._failed: list[str] = []
        known = KnownRuns(folder / KNOWN)
        for name in names:
            try:
                self._sinks[name] = make_sink(name, folder, config, known)
            except Exception as error:  # whatever a tracker may raise
                self._fail(name, error)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Send metrics to all trackers and return a sentence for each that failed since the last
        call."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(stage, step, metrics)
            except Exception as error:
                self._fail(name, error)
        sentences, self._failed = self._failed, []
        return sentences

    def close(self) -> None:
        for sink in self._sinks.values():
            with contextlib.suppress(Exception):
                sink.close()
        self._sinks.clear()

    def _fail(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._failed.append(
            f"{name} takes no more metrics ({reason}). The run goes on; its folder has them all."
        )


class KnownRuns:
    """Which run each tracker has for a run folder, so that a resumed run goes on in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            read = files.read_json(path)
        except (OSError, ValueError, RecursionError):
            read = None
        self._runs: dict[str, str] = {
            name: run
            for name, run in (read if isinstance(read, dict) else {}).items()
            if isinstance(run, str)
        }

    def get(self, tracker: Tracker) -> str | None:
        """Return the name by which a tracker knows the run; None where it has not seen it."""
        return self._runs.get(tracker)

    def put(self, tracker: Tracker, run: str) -> None:
        """Write down the name by which a tracker knows the run."""
        self._runs[tracker] = run
        files.replace(self._path, json.dumps(self._runs, indent=1) + "\n")


def make_sink(name: Tracker, folder: Path, config: Mapping[str, Any], known: KnownRuns) -> Sink:
    """Return a tracker of the run: a new run there, or the run that it has for this folder."""
    match name:
        case "tensorboard":
            return TensorBoard(folder)
        case "wandb":
            return _wandb(folder, config, known)
        case "trackio":
            return _trackio(folder, config, known)
        case "mlflow":
            return _mlflow(folder, config, known)


def _wandb(folder: Path, config: Mapping[str, Any], known: KnownRuns) -> WandB:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = known.get("wandb") or secrets.token_hex(6)
    sink = WandB(
        wandb.init(
            project=PROJECT,
            name=folder.name,
            id=run,
            resume=None if known.get("wandb") is None else "allow",
            config=dict(config),
            dir=str(folder),
        )
    )
    known.put("wandb", run)
    return sink


def _trackio(folder: Path, config: Mapping[str, Any], known: KnownRuns) -> Trackio:
    import trackio

    run = known.get("trackio") or folder.name
    resume = "never" if known.get("trackio") is None else "allow"
    sink = Trackio(trackio.init(PROJECT, name=run, config=dict(config), embed=False, resume=resume))
    known.put("trackio", run)
    return sink


def _mlflow(folder: Path, config: Mapping[str, Any], known: KnownRuns) -> MLflow:
    import mlflow

    client = mlflow.MlflowClient()
    if (run := known.get("mlflow")) is not None:
        with contextlib.suppress(mlflow.exceptions.MlflowException):  # it was deleted there
            client.update_run(run, status="RUNNING")
            return MLflow(run, client)
    existing = client.get_experiment_by_name(PROJECT)
    experiment = existing.experiment_id if existing else client.create_experiment(PROJECT)
    run = client.create_run(experiment, run_name=folder.name).info.run_id
    for key, value in _flat(config):
        client.log_param(run, key, str(value)[:500])
    known.put("mlflow", run)
    return MLflow(run, client)


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise TrackerMissing where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrackerMissing(
                f'run.track = ["{name}"]: {name} is not installed: {install_command(name)}.'
            )


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in table.items()
        for pair in (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(f"{prefix}{key}", value)]
        )
    ]
