"""What the docs say of the code is so."""

import json
import re
import shutil
from pathlib import Path

import pytest

from quartet.algorithms.describe import in_words
from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS

TEXT = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def test_every_preset_has_a_section_and_every_section_a_preset():
    assert set(SECTIONS) == {*ALGORITHMS, *PREFERENCES, "ilql"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_section_names_the_parts_as_they_are(name):
    written = re.search(r"- \*parts\*: (.*?)(?=\n- )", SECTIONS[name], re.DOTALL)
    assert written, "the section has no line of parts"
    assert " ".join(written[1].split()) == in_words(ALGORITHMS[name])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_section_says_what_one_needs_to_know(name):
    for word in ("Constants:", "Deviations:", "Use it"):
        assert word in SECTIONS[name], f"{name} does not say: {word}"


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_a_preference_says_its_constants_and_when_to_use_it(name):
    for word in ("Constants:", "Use it"):
        assert word in SECTIONS[name]


def test_the_notebook_runs(runs, ppo_run, monkeypatch, tmp_path):
    """Every cell, in order, on a run of the tests."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(ppo_run.path)
    monkeypatch.chdir(tmp_path)
    names = cells_run()
    assert names["first"][0]["token_id"] == names["first"][-1]["token_id"]
    assert len(names["own"]) and names["table"].reward.notna().any()


def test_the_notebook_runs_in_the_middle_of_rl(ppo_run, monkeypatch, tmp_path):
    """A run that was stopped after its second step of PPO."""
    latest = tmp_path / "runs" / "latest"
    shutil.copytree(ppo_run.path, latest, ignore=shutil.ignore_patterns("policy", "critic"))
    for file in (*latest.glob("rollouts/*"), *latest.glob("probes/*")):
        if file.stem.isdecimal() and int(file.stem) > 2:
            file.unlink()
    events = (latest / "events.jsonl").read_text().splitlines(keepends=True)
    second = next(
        i
        for i, e in enumerate(events)
        if json.loads(e).get("stage") == "ppo" and json.loads(e).get("step") == 2
    )
    (latest / "events.jsonl").write_text("".join(events[: second + 1]))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names = cells_run()
    assert len(names["own"]) and len(names["table"].query("stage == 'ppo'")) == 2


@pytest.mark.slow
def test_the_notebook_of_one_batch_runs():
    names = cells_run("batch_of_eight")
    assert names["text"].startswith("# One batch of eight responses")


def cells_run(name="reading_a_run"):
    """The variables of a notebook after all of its cells have run here."""
    pytest.importorskip("pandas")
    notebook = json.loads(
        (Path(__file__).parent.parent / "docs" / f"{name}.ipynb").read_text(encoding="utf-8")
    )
    names = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 1
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    return names


@pytest.mark.parametrize("stage", ["sft", "no stage"])
def test_the_notebook_runs_in_docs_and_before_rl(ppo_run, stage, monkeypatch, tmp_path):
    """A run of which the record ends before its first step of RL, or of any stage."""
    latest = tmp_path / "runs" / "latest"
    shutil.copytree(
        ppo_run.path,
        latest,
        ignore=shutil.ignore_patterns("policy", "critic", "rollouts", "probes", "evaluation"),
    )
    events = (latest / "events.jsonl").read_text().splitlines(keepends=True)
    early = [e for e in events if json.loads(e).get("stage") in {None, stage}]
    (latest / "events.jsonl").write_text(
        "".join(e for e in early if json.loads(e)["event"] != "done")
    )
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names = cells_run()
    assert names["own"] is None and names["first"] == []
    steps = names["run"].series["sft"].steps if stage == "sft" else []
    assert len(names["table"]) == len(steps)
