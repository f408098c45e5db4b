"""What trackers got, read back from their own stores; and that none of them can stop a run."""

import contextlib
import importlib
import json
import sqlite3
import struct

import pytest

from quartet.loops.progress import Progress
from quartet.recording import trackers as sinks
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.recording.trackers import Tracking, check_trackers
from quartet.runs.reader import Run
from quartet.runtime.events import Warned
from quartet.runtime.pipeline import Pipeline
from quartet.stages.protocol import StageRun
from tests.support.world import tokenizer

STORY = [
    ("sft", 1, {"loss": 2.5}),
    ("ppo", 1, {"reward": 0.5, "reward/gold": 0.25}),
    ("ppo", 2, {"reward": 1.5, "reward/gold": 0.75}),
]


def tell(name, folder, story=STORY):
    tracking = Tracking([name], folder, {"optim": {"lr": 1e-6}, "seed": 3})
    said = [sentence for event in story for sentence in tracking.log(*event)]
    tracking.close()
    assert said == []


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell("tensorboard", tmp_path)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("ppo/reward")] == [(1, 0.5), (2, 1.5)]
    assert [(e.step, e.value) for e in read.Scalars("sft/loss")] == [(1, 2.5)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    tell("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("quartet")
    [made] = client.search_runs([experiment.experiment_id])
    assert made.data.metrics["ppo/reward"] == 1.5 and made.data.params["optim.lr"] == "1e-06"
    assert made.info.run_name == tmp_path.name and made.info.status == "FINISHED"
    assert [
        (m.step, m.value) for m in client.get_metric_history(made.info.run_id, "ppo/reward.gold")
    ] == [(1, 0.25), (2, 0.75)]


RESUMED = [("ppo", 2, {"reward": 1.5, "reward/gold": 0.75}), ("ppo", 3, {"reward": 2.0})]
"""Step 2 is done again after a kill."""


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_in_the_run_that_it_has(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    tell("mlflow", tmp_path)
    tell("mlflow", tmp_path, RESUMED)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("quartet")
    [made] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(made.info.run_id, "ppo/reward")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 1.5), (2, 1.5), (3, 2.0)]
    assert made.info.status == "FINISHED"
    # deleted for good over there: a new run takes what comes
    (tmp_path / "trackers.json").write_text(json.dumps({"mlflow": "0" * 32}))
    tell("mlflow", tmp_path, RESUMED)
    assert len(client.search_runs([experiment.experiment_id])) == 2
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept["mlflow"] not in {made.info.run_id, "0" * 32}


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_in_the_run_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path)
    (tmp_path / "here" / "ppo").mkdir(parents=True)
    (tmp_path / "there" / "ppo").mkdir(parents=True)
    tell("trackio", tmp_path / "here" / "ppo")
    tell("trackio", tmp_path / "here" / "ppo", RESUMED)
    tell("trackio", tmp_path / "there" / "ppo")  # another run, whose folder has the same name
    [file] = tmp_path.glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("select run_id, count(*) from metrics group by run_id").fetchall()
    assert sorted(count for _, count in rows) == [3, 5]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"wandb": 3}'])
def test_names_of_runs_that_cannot_be_read_are_taken_as_unknown(tmp_path, text):
    (tmp_path / "trackers.json").write_text(text)
    known = sinks.KnownRuns(tmp_path / "trackers.json")
    assert known.get("wandb") is None
    known.put("wandb", "abc")
    assert sinks.KnownRuns(tmp_path / "trackers.json").get("wandb") == "abc"


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path)
    (tmp_path / "run-1").mkdir()
    tell("trackio", tmp_path / "run-1")
    [file] = tmp_path.glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("select metrics from metrics").fetchall()
    text = " ".join(str(row[0]) for row in rows)
    assert "ppo/reward/gold" in text and "0.75" in text and "2.5" in text


def wandb_records(file):
    """Yield the records of an offline file: protobuf messages in a log of LevelDB's format, blocks
    of 32 KiB of chunks with checksum, length and type (1 whole, 2 first, 3 middle, 4 last)."""
    internal = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, message = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield internal.Record.FromString(message)
            message = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell("wandb", tmp_path)
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = {}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(record, kind))
    [run] = records["run"][:1]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name) == ("quartet", tmp_path.name)
    assert config["optim"] == {"lr": 1e-6} and config["seed"] == 3
    rows = [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item}
        for row in records["history"]
    ]
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert rows == [
        {f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}}
        for stage, step, metrics in STORY
    ]
    axes = {m.glob_name: m.step_metric for m in records["metric"] if m.glob_name}
    assert axes == {"sft/*": "sft/step", "ppo/*": "ppo/step"}
    # resumed: another offline file of the same run
    tell("wandb", tmp_path, RESUMED)
    ids = {
        record.run.run_id
        for file in tmp_path.glob("wandb/offline-run-*/*.wandb")
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "run"
    }
    assert ids == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


class Broken:
    def log(self, stage, step, metrics):
        raise ConnectionError("no route to the tracker\nmore")

    def close(self):
        raise RuntimeError


def test_a_tracker_that_fails_says_so_once_and_the_others_go_on(tmp_path, monkeypatch):
    got = []

    class Well:
        def log(self, stage, step, metrics):
            got.append(step)

        def close(self):
            pass

    made = {"wandb": Broken(), "mlflow": Well()}
    monkeypatch.setattr(sinks, "make_sink", lambda name, *_: made[name])
    tracking = Tracking(["wandb", "mlflow"], tmp_path, {})
    said = [tracking.log("ppo", step, {"reward": 0.0}) for step in (1, 2, 3)]
    tracking.close()
    assert said == [
        [
            "wandb takes no more metrics (no route to the tracker). The run goes on; its folder has them all."
        ],
        [],
        [],
    ]
    assert got == [1, 2, 3]


def test_a_tracker_that_cannot_even_begin(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(sinks, "make_sink", refuse)
    tracking = Tracking(["tensorboard"], tmp_path, {})
    assert "tensorboard takes no more metrics (read-only)" in tracking.log("sft", 1, {})[0]


def test_a_tracker_that_is_not_installed_is_said_before_the_run(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        sinks.TrackerMissing, match=r'run.track = \["wandb"\]: wandb is not installed: pip install'
    ):
        check_trackers(["wandb"])


def test_the_pipeline_tells_the_trackers_and_says_when_one_fails(tmp_path, monkeypatch):
    got = []

    class Well(Broken):
        def log(self, stage, step, metrics):
            got.append((stage, step, metrics))

    class Talks:
        name = title = "sft"
        num_steps = 3

        def begin(self, folder):
            return StageRun(
                lambda done: iter(Progress(n, {"loss": 1.0 / n}) for n in (1, 2, 3)), dict
            )

    monkeypatch.setattr(
        sinks, "make_sink", lambda name, *_: {"wandb": Broken(), "mlflow": Well()}[name]
    )
    folder = RunFolder.create(tmp_path, "x", {})
    told = list(
        Pipeline(
            [Talks()],
            folder,
            TokenTexts(tokenizer()),
            tracking=Tracking(["wandb", "mlflow"], folder.path, {}),
        ).run()
    )
    folder.close()
    assert got == [("sft", n, {"loss": 1.0 / n}) for n in (1, 2, 3)]
    [warned] = [event for event in told if isinstance(event, Warned)]
    assert warned.step == 1 and warned.sentence.startswith("wandb takes no more metrics")
    assert [w["rule"] for w in Run(folder.path).warnings] == ["tracker"]
