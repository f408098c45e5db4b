"""The command, its files, and the lines that it prints for what fails."""

import contextlib
import io
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from rl_conformance import CLAIMS, judge, load
from rl_conformance.__main__ import main
from rl_conformance.adapters.stand_in import sums_as_outputs
from rl_conformance.inputs import LENGTHS, MASK, rows
from tests.conformance.mistakes import NoGradient

CUT = "tests.conformance.mistakes:CutK3"


def test_a_library_with_a_failure(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["--library", CUT, "--claim", "kl/", "--json", str(file)]) == 3
    shown = capsys.readouterr().out
    assert "cut-k3 2.0" in shown and "5 holds · 1 fails" in shown
    assert re.search(r"✗ kl/k3-far +1\.0e\+00 +agrees with: estimate cut at ±10; not stated", shown)
    (report,) = json.loads(file.read_text(encoding="utf-8"))
    assert report["torch"] == version("torch")
    assert [each["outcome"] for each in report["verdicts"] if each["claim"] == "kl/k3-far"] == ["fails"]  # fmt: skip


def test_a_library_without_one(capsys):
    stated = "tests.conformance.mistakes:StatedCutK3"
    assert main(["--library", stated, "--claim", "kl/k3"]) == 0
    assert "1 holds · 1 convention" in capsys.readouterr().out


def test_a_table_of_reports_goes_into_a_page(tmp_path, capsys):
    file, page = tmp_path / "report.json", tmp_path / "page.md"
    main(["--library", CUT, "--claim", "kl/k3", "--json", str(file)])
    page.write_text(
        "before\n<!-- table -->\nearlier\n<!-- end of table -->\nafter\n", encoding="utf-8"
    )
    assert main(["--table", str(file), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table -->\n| claims about | cut-k3 2.0 |")
    assert "| kl | 1 ✓ · 1 ✗ |" in text and "| claim | cut-k3 2.0 |" in text
    assert text.endswith("<!-- end of table -->\nafter\n") and "earlier" not in text
    assert "| ✗ 1 |" in text and "1. difference 1, agrees with: estimate cut at ±10" in text


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("trll", "no such adapter; give one of quartet, trl"),
        ("nowhere.py:Mine", "No module named 'nowhere'"),
        ("tests.conformance.mistakes:ratio", "ratio is no subclass of rl_conformance.Library"),
    ],
)
def test_what_cannot_be_judged_is_refused(library, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--library", library])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_wrong_requests_are_refused_in_a_sentence(tmp_path, capsys):
    page, empty, other = tmp_path / "page.md", tmp_path / "empty.json", tmp_path / "other.json"
    page.write_text("no place\n", encoding="utf-8")
    empty.write_text("[]", encoding="utf-8")
    other.write_text('[{"library": "x"}]', encoding="utf-8")
    nowhere = tmp_path / "nowhere" / "report.json"
    for words, said in [
        (["--table", str(empty), "--into", str(page)], "page.md has no lines <!-- table -->"),
        (["--table", str(empty), "--into", str(nowhere)], "report.json is no file."),
        (["--table", str(nowhere)], "report.json cannot be read: No such file or directory."),
        (["--table", str(page)], "page.md is no report. Give a file that --json wrote."),
        (["--table", str(other)], "other.json is no report."),
        (["--claim", "kl/k9"], 'no claim has "kl/k9" in its name.'),
        (["--library", CUT, "--json", str(nowhere)], "nowhere is no folder."),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "no place\n"


@pytest.mark.parametrize(
    ("key", "name"),
    [(CUT, "kl/k3-far"), ("tests.conformance.mistakes:NoGradient", "ratios/far-above-clipped")],
)
def test_a_reproduction_prints_what_was_measured(key, name):
    claim = next(claim for claim in CLAIMS if claim.name == name)
    lines = judge(claim, load(key), key).reproduction
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines, {})
    measured = re.search(r"^# measured: (.*)", lines, re.MULTILINE)[1].split(", ")
    for number in measured:
        assert re.search(rf"(?<![\d.]){re.escape(number)}", printed.getvalue()), (number, printed.getvalue())  # fmt: skip


def test_a_reproduction_is_of_arguments_as_they_were():
    class Overwrites(NoGradient):
        def whiten(self, x, mask):
            return x.mul_(2) * x.shape[1]

    claim = next(claim for claim in CLAIMS if claim.name == "garbage/whiten")
    lines = judge(claim, Overwrites(), "x").reproduction
    assert "1000.0" in lines and "2000.0" not in lines


def test_a_stand_in_gives_the_sums_that_it_was_asked_for():
    tokens, sums = torch.tensor([3.0, 4.0]), torch.tensor([-2.0, -1.0])
    columns = torch.arange(5)
    mask = ((columns > 0) & (columns <= tokens[:, None])).long()
    outputs = sums_as_outputs(sums, tokens, mask)
    torch.testing.assert_close(outputs.log_probs.sum(1), sums)
    by_logits = outputs.logits.log_softmax(-1)[:, :-1, 0]
    torch.testing.assert_close((by_logits * mask[:, 1:]).sum(1), sums)


def test_the_shared_batch_has_the_lengths_it_says():
    assert tuple(len(row) for row in rows(MASK.float())) == LENGTHS


def test_only_its_own_adapter_imports_quartet():
    source = Path("conformance/src/rl_conformance")
    importing = {
        file.name
        for file in source.rglob("*.py")
        if re.search(r"^\s*(?:from|import) quartet\b", file.read_text("utf-8"), re.MULTILINE)
    }
    assert importing == {"quartet.py"}
