"""The stage that waits for labels, by hand and in runs with a simulated labeller."""

import dataclasses
import json
import threading

import pytest

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.data import DataError
from quartet.data.files import rows
from quartet.generation.sampling import Sampling
from quartet.labels.log import Label, LabelLog, read_labels
from quartet.labels.pairs import Pair
from quartet.recipes import recipe_path
from quartet.stages import label as label_stage
from quartet.stages.label import LabelStage
from tests.support.tiny_run import make_run

PAIRS = [Pair(f"q{i}", "x" * (i % 3), "xx" + "y" * (i % 4)) for i in range(40)]


def length(prompt, response):
    return float(len(response))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "label").mkdir()
    lines = (
        json.dumps({"prompt": p.prompt, "answer_a": p.answer_a, "answer_b": p.answer_b})
        for p in PAIRS
    )
    (tmp_path / "label" / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def stage(**changes):
    made = LabelStage("label", (), 40, 20, None, 0.0, length, Sampling(), None, lambda _: None, 0)
    return dataclasses.replace(made, **changes)


def labels_of(folder):
    return [entry for _, entry in read_labels(folder / "label" / "labels.jsonl").labels]


def test_simulated_labels_follow_the_gold_reward_and_the_noise(folder):
    run = stage().begin(folder)
    assert [step.number for step in run.steps(0)] == list(range(1, 21))
    labels = labels_of(folder)
    assert len(labels) == 20
    for entry in labels:
        a, b = len(entry.pair.answer_a), len(entry.pair.answer_b)
        assert entry.verdict == ("tie" if a == b else "a" if a > b else "b")
    summary = run.finish()
    decided = [entry for entry in labels if entry.verdict != "tie"]
    assert summary["labels"] == 20 and summary["comparisons"] == len(decided) == len(
        list(rows(folder / "comparisons"))
    )
    (folder / "label" / "labels.jsonl").unlink()
    list(stage(simulated=1.0).begin(folder).steps(0))
    turned = {"a": "b", "b": "a", "tie": "tie"}
    assert [entry.verdict for entry in labels_of(folder)] == [
        turned[entry.verdict] for entry in labels
    ]


def test_the_stage_waits_for_people_and_goes_on_where_the_labels_are(folder, monkeypatch):
    monkeypatch.setattr(label_stage, "POLL_SECONDS", 0.005)
    log = LabelLog(folder / "label" / "labels.jsonl")

    def give(first, last):
        for i in range(first, last):
            log.add(Label(str(i), "ann", PAIRS[i], "tie", "ab"))
        log.add(Label(f"repeat {last}", "ann", PAIRS[0], "a", "ab", repeat=True))

    give(0, 5)
    stopped = stage(simulated=None).begin(folder).steps(0)
    assert [next(stopped).number for _ in range(5)] == [1, 2, 3, 4, 5]
    person = threading.Timer(0.1, give, (5, 20))
    person.start()
    assert [step.number for step in stage(simulated=None).begin(folder).steps(0)] == list(
        range(1, 21)
    )
    person.join()
    log.close()


def test_earlier_comparisons_are_kept_beside_the_new_ones(folder, tmp_path):
    earlier = tmp_path / "old.jsonl"
    earlier.write_text('{"prompt": "old", "chosen": "a", "rejected": "b"}\n')
    run = stage(earlier=earlier).begin(folder)
    list(run.steps(0))
    new = run.finish()["comparisons"]
    found = [row["prompt"] for _, row in rows(folder / "comparisons")]
    assert found[0] == "old" and len(found) == new + 1


def test_earlier_comparisons_that_are_not_there_are_refused_before_the_run(tmp_path):
    words = [f"label.earlier={tmp_path / 'nowhere'}", "data.rows=64"]
    config = read_settings(recipe_path("labelled-reviews"), words).config
    with pytest.raises(DataError, match=r"label.earlier = .*/nowhere: no such file or folder\."):
        build(config)


def test_too_few_different_answers_are_refused_before_anyone_labels(folder):
    with pytest.raises(
        DataError, match=r"label.labels = 41: .* only 23 of 40 prompts. Raise label.pairs"
    ):
        stage(num_steps=41).begin(folder)


@pytest.mark.slow
def test_two_rounds_of_label_reward_model_and_ppo(tmp_path):
    common = (
        *("reward_model.steps=3", "reward_model.batch_size=8", "run.steps=1"),
        *("label.pairs=40", "label.labels=24", "label.simulated=0.1"),
    )
    first = make_run(tmp_path, "labelled-reviews", *common, "policy.create.max_length=128")
    assert set(first.series) >= {"sft", "reward_model", "ppo"}
    assert first.summary("label")["labels"] == 24
    second = make_run(
        *(tmp_path, "labelled-reviews", *common),
        "recipe=['label','reward_model','ppo','evaluation']",
        f"policy.model={first.path / 'policy'}",
        f"label.earlier={first.path / 'comparisons'}",
    )
    before, after = (list(rows(run.path / "comparisons")) for run in (first, second))
    assert len(after) > len(before)
    assert [row for _, row in after[: len(before)]] == [row for _, row in before]
    assert (second.path / "reward_model" / "model.safetensors").is_file()
