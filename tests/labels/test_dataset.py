"""Labels as a data set with a card."""

import json

import pytest
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from quartet.cli import app
from quartet.data.shapes import read_examples
from quartet.labels.dataset import write_dataset
from quartet.labels.log import Label, LabelError, LabelLog
from quartet.labels.pairs import Pair
from quartet.models import hub
from tests.models.test_export import Hub


def pair(number):
    return Pair(f"prompt {number}", f"a{number}", f"b{number}", "mine.jsonl:1")


def label(number, labeller, verdict, repeat=False, comment=""):
    name = f"{number}{labeller}{repeat}"
    return Label(name, labeller, pair(number), verdict, "ab", repeat, comment, time="2026-01-01")


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    log = LabelLog(path)
    for each in (
        label(1, "Zoë", "a"),
        label(1, "judge gpt", "b"),
        label(2, "Zoë", "tie"),
        label(3, "Adam", "b", comment="my phone number"),
        label(1, "Zoë", "a", repeat=True),
        label(4, "Adam", "skip"),
    ):
        log.add(each)
    log.close()
    return path


def test_comparisons_without_what_is_private(labels, tmp_path):
    assert write_dataset(labels, tmp_path / "set") == 3
    lines = (tmp_path / "set" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == [
        {"prompt": "prompt 1", "chosen": "a1", "rejected": "b1", "labeller": "person 1"},
        {"prompt": "prompt 1", "chosen": "b1", "rejected": "a1", "labeller": "judge gpt"},
        {"prompt": "prompt 3", "chosen": "b3", "rejected": "a3", "labeller": "person 2"},
    ]
    text = "".join(file.read_text() for file in (tmp_path / "set").iterdir())
    assert not any(word in text for word in ("Zoë", "Adam", "phone", "mine.jsonl", "2026-01"))


def test_the_card_is_what_the_hub_reads(labels, tmp_path):
    write_dataset(labels, tmp_path / "set")
    card = DatasetCard.load(tmp_path / "set" / "README.md")
    assert card.data.size_categories == ["n<1K"] and "human-feedback" in card.data.tags
    assert card.data.configs == [{"config_name": "default", "data_files": "train.jsonl"}]
    for words in (
        "# set",
        "3 comparisons of two answers",
        "- person 1: 1 comparison\n",
        "person 1 with their own repeated labels: 1 pair, 100% equal",
        "judge gpt and person 1: 1 pair, 0% equal",
        "1 ties, 1 skipped, 1 repeated. Comments",
    ):
        assert words in card.text


def test_a_judge_alone_is_called_one(tmp_path):
    log = LabelLog(tmp_path / "x.jsonl")
    log.add(label(1, "judge gpt", "a"))
    log.close()
    write_dataset(tmp_path / "x.jsonl", tmp_path / "set")
    assert DatasetCard.load(tmp_path / "set" / "README.md").data.tags[1] == "ai-feedback"


def test_the_data_set_is_training_data(labels, tmp_path):
    write_dataset(labels, tmp_path / "set")
    rows = read_examples(tmp_path / "set" / "train.jsonl", "comparisons", {}, None)
    assert [(row.prompt, row.chosen) for row in rows][2] == ("prompt 3", "b3")


def test_nothing_is_left_of_what_cannot_be_written(labels, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    with pytest.raises(LabelError, match="exists already"):
        write_dataset(labels, tmp_path / "set")
    (tmp_path / "none.jsonl").write_text(json.dumps(label(2, "Zoë", "tie").row()) + "\n")
    with pytest.raises(LabelError, match="no label that prefers an answer"):
        write_dataset(tmp_path / "none.jsonl", tmp_path / "other")
    monkeypatch.setattr("quartet.labels.dataset.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(labels, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.jsonl", "none.jsonl", "set"}


def command(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_command_writes_and_uploads_it(labels, tmp_path, monkeypatch):
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    done = command(labels, "--to", tmp_path / "set", "--push", "me/set")
    assert done.exit_code == 0 and "set written, 3 comparisons" in done.output
    assert fake.asked == [
        ("me/set", "dataset", True, True),
        ("me/set", "dataset", "Data set by Quartet", ["README.md", "train.jsonl"]),
    ]
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(OSError("no route")))
    done = command(labels, "--to", tmp_path / "again", "--push", "me/set")
    assert done.exit_code == 1 and "--repo-type dataset" in done.output


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("hello\n")
    done = command(tmp_path / "x.txt", "--to", tmp_path / "set")
    assert done.exit_code == 2 and "neither a run folder nor a file of labels" in done.output
