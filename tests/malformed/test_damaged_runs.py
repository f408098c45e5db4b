"""Run folders that are damaged, or made to harm their readers: each reader answers, says what it could not read, and shows the
other runs."""

import contextlib
import os
import shutil
from urllib.parse import quote

import pytest
from pyarrow import ArrowInvalid
from starlette.testclient import TestClient

from quartet.runs import event_log
from quartet.runs.reader import Run, find_runs
from quartet.studio.app import make_app
from quartet.studio.first_policy import folder_of
from tests.malformed.damages import (
    EVALUATION,
    GONE,
    RECORD,
    SECRET,
    SETTINGS,
    STEP,
    TOKENS,
    config,
    event,
    many_rows,
)
from tests.malformed.reading_runs import WHOLE, Readers, verb
from tests.support.tiny_run import put_words_into_its_mouth

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def readers(ppo_run, tmp_path_factory):
    return Readers(ppo_run.path, tmp_path_factory.mktemp("readers"))


def survives(readers, change, sentence, pages, data=()):
    change(readers.restore())
    problems, shown = readers.problems(), readers.pages(pages)
    readers.data(data)
    assert sentence in problems and sentence in shown
    assert SECRET not in problems + shown + readers.listed()


def test_a_run_that_is_whole_has_no_problems(readers):
    readers.restore()
    assert readers.methods(figures=True) == ""
    assert "could not be read" not in readers.pages() + readers.listed() + readers.verbs()
    readers.data()


@pytest.mark.parametrize(("change", "sentence"), RECORD.values(), ids=RECORD)
def test_a_record_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("",))


@pytest.mark.parametrize(("change", "sentence"), SETTINGS.values(), ids=SETTINGS)
def test_a_config_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("config", "tokens?step=1&sample=0"))


@pytest.mark.parametrize(("change", "sentence"), EVALUATION.values(), ids=EVALUATION)
def test_an_evaluation_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("frontier", "answers", "reward-model"))


@pytest.mark.parametrize(("change", "sentence"), TOKENS.values(), ids=TOKENS)
def test_rollouts_that_are_damaged(readers, change, sentence):
    change(readers.restore())
    assert sentence.removeprefix(STEP) in readers.methods()
    assert sentence in readers.pages(("samples?step=1", "tokens?step=1&sample=0"))


@pytest.mark.parametrize(("change", "sentence"), GONE.values(), ids=GONE)
def test_a_record_that_cannot_be_opened(readers, change, sentence):
    """The run is listed with the reason; what is asked of it is refused with the reason."""
    change(readers.restore())
    for text in (readers.listed(), readers.pages(("",)), readers.methods(), readers.verbs()):
        assert sentence in text
    readers.data()
    readers.comparison()


# --- links, names, and what is written -------------------------------------------------------------------------------------------


def test_latest_works_and_other_links_in_a_folder_of_runs_are_passed_over(readers, tmp_path):
    victim = readers.restore()
    (tmp_path / "runs").mkdir()
    moved = shutil.move(victim, tmp_path / "runs" / "whole")
    shutil.copytree(readers.original, tmp_path / "elsewhere")
    (tmp_path / "runs" / "latest").symlink_to("whole")
    (tmp_path / "runs" / "stranger").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["whole"]
    for named in (moved, tmp_path / "runs" / "latest", tmp_path / "runs" / "stranger"):
        assert Run(named).status == "done", "a run that is named may be a link"
        assert "score" in verb("inspect", named)
        assert (
            TestClient(make_app([named]), base_url="http://127.0.0.1")
            .get("/")
            .text.count("checkbox")
            == 1
        )
    served = TestClient(make_app([tmp_path / "runs"]), base_url="http://127.0.0.1")
    assert (
        served.get("/run/stranger/config").status_code
        == served.get("/run/latest/config").status_code
        == 404
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"\xff\xfe", "\\udcff\\udcfe"),
        (b"\x1b[2J\n", "\\x1b[2J\\n"),
        ("\u202eאב".encode(), "\\u202eאב"),
        (b"a" * 90, "a" * 90),
    ],
    ids=["no UTF-8", "for terminals", "from right to left", "long"],
)
def test_a_folder_with_a_strange_name_is_listed_and_opens(readers, name, shown):
    readers.restore()
    folder = readers.root / os.fsdecode(name)
    shutil.copytree(readers.original, folder)
    try:
        assert f"<strong>{shown}</strong>" in readers.listed()
        assert shown in verb("runs", readers.root).replace("\n", "").replace(
            " ", ""
        ) and shown in repr(Run(folder))
        assert readers.client.get(f"/run/{quote(shown)}/").status_code == 200
    finally:
        shutil.rmtree(folder)


def test_no_verb_prints_what_a_terminal_would_obey(readers):
    """`verb` looks at each output. The words of a model, the values of a config, a judge's name and an error."""
    victim = readers.restore()
    put_words_into_its_mouth(victim, "\x1b[2J")
    config('name = "\\u001b[2J"\n[data]\ntrain = "\\u001b[2J"')(victim)
    event("failed", error="\x1b[2J")(victim)
    event("warning", sentence="\x1b[2J")(victim)
    assert "\\x1b[2J" in verb("inspect", victim, "--step", 1, "--sample", 0)
    assert "\\x1b[2J" in verb("compare", victim, readers.root / WHOLE)
    readers.verbs()


def test_a_report_is_never_written_through_a_link(readers, tmp_path):
    victim = readers.restore()
    outside = tmp_path / "outside"
    outside.write_text(SECRET)
    for name in ("report.html", "report.tmp"):
        (victim / name).symlink_to(outside)
    assert "written" in verb("report", victim)
    assert outside.read_text() == SECRET and not (victim / "report.html").is_symlink()
    (victim / "report.html").unlink()
    (victim / "report.html").mkdir()
    assert "report.html: cannot be written (Is a directory)." in verb("report", victim)


def test_a_model_behind_a_link_is_not_asked(readers, ppo_run):
    victim = readers.restore()
    (victim / "sft").symlink_to(ppo_run.path / "sft")
    assert folder_of(Run(victim)) is None
    (victim / "sft").unlink()
    shutil.copytree(ppo_run.path / "sft", victim / "sft")
    assert folder_of(Run(victim)) == victim / "sft"
    (victim / "sft" / "model.safetensors").unlink()
    (victim / "sft" / "model.safetensors").symlink_to(ppo_run.path / "sft" / "model.safetensors")
    assert folder_of(Run(victim)) is None


def test_a_record_of_gigabytes_is_read_within_bounds(readers, monkeypatch):
    """A sparse file of 3 GB that is one line; then the bounds on lines and numbers, with smaller ones in their place."""
    monkeypatch.setattr(event_log, "MAX_BYTES", 64 << 20)
    record = readers.restore() / "events.jsonl"
    with record.open("ab") as file:
        file.truncate(3 << 30)
    said = readers.methods()
    assert "is longer than 4 MB" in said and "events.jsonl is too long: only its first" in said
    assert "is too long" in readers.pages(("",)) and not Run(readers.victim).refresh()
    readers.restore()
    whole = len(Run(readers.victim).metrics)
    monkeypatch.setattr(event_log, "MAX_LINES", 9)
    assert 0 < len(Run(readers.victim).metrics) < whole
    assert "only its first 9 lines" in readers.methods()


BOTH = (OSError, ValueError, KeyError, TypeError, ArrowInvalid)
"""What a change raises where it excludes another."""


def test_pages_of_the_worst_of_all(readers):
    """All tables of damage at once, one after another on the same folder, with every page, verb and figure."""
    victim = readers.restore()
    for table in (RECORD, SETTINGS, EVALUATION, TOKENS):
        for change, _ in list(table.values())[:20]:
            with contextlib.suppress(*BOTH):
                change(victim)
    for read in (readers.listed, readers.pages, readers.data, readers.comparison, readers.verbs):
        read()
    readers.methods(figures=True)


@pytest.mark.long
def test_a_million_rows_are_a_step(readers):
    many_rows(1_000_000)(readers.restore())
    assert len(Run(readers.victim).rollouts(1)) == 1_000_000
    assert "1 rollout." in readers.pages(("samples?step=1",))
    assert "the first 50,000 of prompt and response are shown" in readers.pages(
        ("tokens?step=1&sample=0",)
    )
