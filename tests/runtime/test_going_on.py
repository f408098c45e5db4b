"""What a resumed run says, and what it makes of a record that was damaged meanwhile."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from quartet import files
from quartet.cli import app
from quartet.cli.lifecycle import _say_done
from quartet.config.toml import read_settings
from quartet.launch import start
from quartet.loops.progress import Progress
from quartet.recipes import recipe_path
from quartet.recording.run_folder import RunFolder, read_record, sweep_strays
from quartet.runtime.events import Advanced, Started
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.worker import WorkerLost
from quartet.training.checkpoint import Checkpoint
from tests.cli.test_screen import STAGE, shown
from tests.support.tiny_run import SMALL, SMALL_REVIEWS, make_run

WORDS = (
    *SMALL,
    'recipe=["sft", "grpo"]',
    "run.steps=2",
    "run.checkpoint_every=1",
    "optim.schedule=constant",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "runs", "sums", *WORDS).path


@pytest.fixture
def run(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "runs" / whole.name))


def resumed(run: Path, *words: str):
    return CliRunner().invoke(app, ["run", str(run), "--resume", *words])


def test_a_run_that_is_done_says_how_to_add_steps_and_what_it_says_works(run):
    done = resumed(run)
    assert done.exit_code == 0 and "is done" in done.stdout
    said = done.stdout.splitlines()[-1]
    assert said == f"next   to add steps: quartet run {run} --resume run.steps=4"
    more = CliRunner().invoke(app, said.partition("quartet ")[2].split())
    assert more.exit_code == 0, more.output
    steps = [
        e["step"]
        for e in read_record(run).events
        if e["event"] == "metrics" and e["stage"] == "grpo"
    ]
    assert steps == [1, 2, 3, 4]


def test_a_run_that_is_done_gets_the_report_that_a_kill_came_before(run):
    (run / "checkpoints" / ".grpo-000001.gone").mkdir()
    (run / "report.html").unlink(missing_ok=True)
    done = resumed(run)
    assert f"report {run / 'report.html'}" in done.stdout and (run / "report.html").is_file()
    assert not (run / "checkpoints" / ".grpo-000001.gone").exists()


@pytest.mark.parametrize(("name", "steps"), [("sft", 6), ("reward_model", 6), ("dpo", 400)])
def test_other_stages_are_lengthened_by_their_own_key(run, capsys, name, steps):
    """Where learning rates fell to the end, more steps would have been other steps: that has to be accepted."""
    key = {"dpo": "preference"}.get(name, name) + ".steps"
    words = [w for w in SMALL_REVIEWS if w.startswith(("policy", "data", name))]
    _say_done(
        run, read_settings(recipe_path("reviews"), [*words, f'recipe="{name}"'], "recipe reviews")
    )
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f"--resume {key}={steps} --accept {key}")
    )


def test_progress_keeps_the_numbers_that_it_began_with():
    steps = [Advanced(STAGE, Progress(4, {"reward": 1.92, "kl": 2.0}))]
    earlier = [{"reward": -3.41}, {"reward": 0.0}, {"reward": 0.0}]
    lines = shown(Started(STAGE, 1, 1, 3, earlier), *steps, terminal=True)
    assert "reward −3.41 → −0.37" in lines


LINES = {
    "a huge step": b'{"event": "metrics", "stage": "grpo", "step": 1000000000000000000000000000000, "metrics": {"reward": 1}, "time": 1}',
    "a negative step": b'{"event": "metrics", "stage": "grpo", "step": -1, "metrics": {}, "time": 1}',
    "a step of text": b'{"event": "metrics", "stage": "grpo", "step": "1", "metrics": {}, "time": 1}',
    "a metric of text": b'{"event": "metrics", "stage": "grpo", "step": 9, "metrics": {"reward": "x"}, "time": 1}',
    "a huge metric": b'{"event": "metrics", "stage": "grpo", "step": 9, "metrics": {"reward": 1'
    + b"0" * 400
    + b'}, "time": 1}',
    "metrics that are a list": b'{"event": "metrics", "stage": "grpo", "step": 9, "metrics": [], "time": 1}',
    "metrics of no stage": b'{"event": "metrics", "step": 9, "metrics": {}, "time": 1}',
    "deeply nested": b"[" * 100_000 + b"]" * 100_000,
    "an event of a number": b'{"event": 3}',
    "a stage that is a list": b'{"event": "started", "stage": []}',
    "a time of text": b'{"event": "started", "stage": "sft", "time": "now"}',
    "not an object": b"3",
    "not JSON": b'{"event": "metr',
    "not UTF-8": b"\xff\xfe\x00",
    "no text": b"\x00" * 100,
    "digits without end": b'{"event": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_no_event_is_counted_and_those_around_it_are_read(tmp_path, name):
    good = b'{"time": 1.0, "event": "metrics", "stage": "sft", "step": 1, "metrics": {"loss": NaN}}'
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([good, LINES[name], good, b""]))
    record = read_record(tmp_path)
    assert record.damaged == 1 and not record.is_done
    assert [e["step"] for e in record.events if "loss" in e.get("metrics", {})] == [1, 1]


def test_a_run_whose_record_was_damaged_goes_on_and_says_so(whole, run):
    """Behind its last checkpoint: the lines go, and the steps are taken again. Before it: only if that is accepted."""
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    shutil.rmtree(run / "checkpoints" / "grpo-000002")
    (run / "events.jsonl").write_bytes(
        b"".join([*lines, *(line + b"\n" for line in LINES.values())])
    )
    done = resumed(run)
    assert done.exit_code == 0, done.output
    assert (run / "policy" / "model.safetensors").read_bytes() == (
        whole / "policy" / "model.safetensors"
    ).read_bytes()
    assert read_record(run).damaged == 0
    text = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(
        LINES["a huge step"] + b"\n" + LINES["deeply nested"] + b"\n" + text
    )
    refused = resumed(run, "run.steps=3")
    assert refused.exit_code == 2 and "--accept events.jsonl" in refused.stderr
    accepted = resumed(run, "run.steps=3", "--accept", "events.jsonl")
    assert accepted.exit_code == 0, accepted.output
    assert "note   2 lines of events.jsonl cannot be read and are passed over" in accepted.stdout


def test_a_run_that_never_reaches_its_next_checkpoint_says_so(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "grpo-000002")

    def lost(*_):
        raise WorkerLost([0], "the machine is gone.")

    with monkeypatch.context() as patched:
        patched.setattr(start, "open_workers", lost)
        said = [resumed(run).stdout for _ in range(4)]
    assert [text.count("it gets no further") for text in said] == [0, 0, 1, 1]
    assert "was resumed from grpo-000001 2 times before" in said[2]
    assert "was resumed from grpo-000001 3 times before" in said[3]
    resumed(run)
    assert "gets no further" not in resumed(run, "run.steps=3").stdout, "there is another one"


def test_a_record_cut_short_within_a_line_is_not_written_on_behind_half_of_it(tmp_path):
    folder = RunFolder.create(tmp_path, "x", {})
    folder.event("note", sentence="whole")
    size = (folder.path / "events.jsonl").stat().st_size
    folder.event("note", sentence="half")
    os.truncate(folder.path / "events.jsonl", size + 10)
    folder.cut_back(10**6, None)
    folder.event("note", sentence="next")
    folder.close()
    record = read_record(folder.path)
    assert [e["sentence"] for e in record.events] == ["whole", "next"] and record.damaged == 1


def test_an_event_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "x", {})
    folder.event("note", sentence="before")

    class HalfFull:
        """Takes ten bytes, then there is no room."""

        def __init__(self, file) -> None:
            self.file, self.calls = file, 0

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:10])

    real = folder._events
    folder._events = HalfFull(real)
    with pytest.raises(OSError, match="No space left"):
        folder.event("note", sentence="lost")
    folder._events = real
    folder.event("note", sentence="after")
    folder.close()
    record = read_record(folder.path)
    assert [e["sentence"] for e in record.events] == ["before", "after"] and record.damaged == 0


def test_an_event_takes_text_that_is_not_unicode(tmp_path):
    folder = RunFolder.create(tmp_path, "x", {})
    folder.event("note", sentence="a \ud800 b →")
    folder.close()
    assert read_record(folder.path).events[0]["sentence"] == "a \\ud800 b →"
    assert (folder.path / "events.jsonl").read_text(encoding="utf-8")


def test_the_folder_of_a_run_that_never_began_goes_and_one_that_begins_stays(tmp_path):
    dead = tmp_path / ".1128-0900-x.123.tmp"
    dead.mkdir()
    (dead / "events.jsonl").write_text("")
    empty, old = tmp_path / ".1128-0901-x.124.tmp", tmp_path / ".1128-0902-x.125.tmp"
    for path in (empty, old):
        path.mkdir()
    os.utime(old, (0, 0))
    living = tmp_path / ".1128-0903-x.126.tmp"
    living.mkdir()
    begins = RunFolder(living)
    (tmp_path / ".mine.tmp").mkdir()
    sweep_strays(tmp_path)
    begins.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [empty.name, living.name, ".mine.tmp"]


def test_a_file_that_cannot_be_replaced_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    files.replace(tmp_path / "x", "old")

    def full(path, text):
        path.write_text(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError):
        files.replace(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_begins_two_runs_at_once_gets_two_folders(tmp_path):
    made = [RunFolder.create(tmp_path, "x", {"a": "b"}) for _ in range(3)]
    for folder in made:
        folder.close()
    assert len({folder.path for folder in made}) == 3
    assert all(
        (folder.path / "a").read_text() == "b"
        and json.loads((folder.path / "env.json").read_text())
        for folder in made
    )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("at", "step", "kept"),
    [
        ("sft", 2, -1),
        ("custom", 0, 0),
        ("custom", 2, 2),
        ("evaluation", 0, 6),
        ("evaluation", 1, 6),
    ],
)
@pytest.mark.parametrize("first_step", [None, 0])
def test_rollouts_of_any_stage_that_samples_stay_behind_it(at, step, kept, first_step):
    """Only those of RL stages did, and a run that was killed in its evaluation lost all others."""
    sampling = {"samples": True, "num_steps": 6}
    sampling |= {} if first_step is None else {"first_step": first_step}
    stages = [
        SimpleNamespace(name="sft", num_steps=4),
        SimpleNamespace(name="custom", **sampling),
        SimpleNamespace(name="evaluation", num_steps=2),
    ]
    found = []
    folder = SimpleNamespace(
        cut_back=lambda size, last: found.append(last),
        record=lambda: SimpleNamespace(events=[]),
        event=lambda *_, **__: None,
    )
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.stages, pipeline.folder = stages, folder
    left = []
    pipeline.checkpoints = SimpleNamespace(
        stages={s.name: i for i, s in enumerate(stages)}, remove_superfluous=left.append
    )
    facts = {"stage": at, "step": step, "events": {"size": 0}}
    pipeline.cut_back(Checkpoint(Path("x"), facts, {}, frozenset()))
    assert found == [kept] and left == ["x"], "what a kill left of older checkpoints goes"
