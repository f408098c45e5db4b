"""What the docs say of the code is so."""

import json
import re
from pathlib import Path

import pytest

from quartet.algorithms.describe import in_words
from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS

TEXT = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def test_every_preset_has_a_section_and_every_section_a_preset():
    assert set(SECTIONS) == {*ALGORITHMS, *PREFERENCES}


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
    pytest.importorskip("pandas")
    notebook = json.loads(
        (Path(__file__).parent.parent / "docs" / "reading_a_run.ipynb").read_text(encoding="utf-8")
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(ppo_run.path)
    monkeypatch.chdir(tmp_path)
    names = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    assert names["first"][0]["token_id"] == names["first"][-1]["token_id"]
