"""Trackers: other tools that a run sends its metrics to. The run folder always has all metrics."""

import contextlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from quartet.errors import QuartetError
from quartet.io.install import install_command

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

PROJECT = "quartet"
"""The name of the project or experiment in a tracker."""


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


class WandbRun:
    """A run of Weights & Biases, or of Trackio, whose interface is the same. WANDB_MODE=offline
    keeps Weights & Biases data in the run's folder; TRACKIO_DIR sets where Trackio stores its
    data. A resumed run is a new run there, with the same name."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(
            {f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}}
        )

    def close(self) -> None:
        self._run.finish()


class WandB(WandbRun):
    """A run of Weights & Biases, whose charts have the steps of their stage on the x axis."""

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

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        existing = self._client.get_experiment_by_name(PROJECT)
        experiment = existing.experiment_id if existing else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for key, value in _flat(config):
            self._client.log_param(self._id, key, str(value)[:500])

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
        for name in names:
            try:
                self._sinks[name] = make_sink(name, folder, config)
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


def make_sink(name: Tracker, folder: Path, config: Mapping[str, Any]) -> Sink:
    match name:
        case "tensorboard":
            return TensorBoard(folder)
        case "wandb":
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            return WandB(
                wandb.init(project=PROJECT, name=folder.name, config=dict(config), dir=str(folder))
            )
        case "trackio":
            import trackio

            return WandbRun(
                trackio.init(PROJECT, name=folder.name, config=dict(config), embed=False)
            )
        case "mlflow":
            return MLflow(folder, config)


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
