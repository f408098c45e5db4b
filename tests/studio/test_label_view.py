"""The page of a run's labels: progress, agreement, and the pairs with their comments."""

import re

import pytest
from starlette.testclient import TestClient

from quartet.labels.log import Label, LabelLog
from quartet.labels.pairs import Pair
from quartet.recording.run_folder import RunFolder
from quartet.runs.label_tables import labelled_run
from quartet.runs.reader import Run
from quartet.studio.app import make_app

EVIL = "<script>alert(1)</script>"
FIRST = "aaaaabbbbt"
SECOND = "aaaabbbbbb"


@pytest.fixture
def run(tmp_path):
    """Ten pairs, labelled by two people; the first sees two of them again, and changes one verdict."""
    config = 'recipe = ["sft", "label", "reward_model"]\n[label]\nlabels = 30\n'
    files = {"config.toml": config, "config.resolved.toml": config}
    folder = RunFolder.create(tmp_path / "runs", "labelled", files)
    folder.close()
    place = folder.path
    (place / "label").mkdir()
    log = LabelLog(place / "label" / "labels.jsonl")
    pairs = [Pair(f"prompt {n}", f"answer {n}", f"other {n}") for n in range(10)]
    names = {"a": "a", "b": "b", "t": "tie"}
    for who, verdicts in (("ann", FIRST), ("bob", SECOND)):
        for n, verdict in enumerate(verdicts):
            comment = EVIL if (who, n) == ("bob", 3) else ""
            log.add(Label(f"{who}{n}", who, pairs[n], names[verdict], "ab", False, comment))
    for n, verdict in ((0, "a"), (1, "b")):
        log.add(Label(f"again{n}", "ann", pairs[n], verdict, "ba", True))
    gone = Label("gone", "cy", pairs[0], "a", "ab")
    log.add(gone)
    log.undo(gone)
    log.close()
    return Run(place)


def test_the_numbers_are_those_of_the_file(run):
    labelled = labelled_run(run)
    # 20 labels; ann prefers nine times, bob ten times. Of ten pairs 4 + 4 verdicts are equal:
    # p_o = 0.8, p_e = (5·4 + 4·6 + 1·0) / 100 = 0.44, κ = 0.36 / 0.56 = 0.64.
    assert labelled.sentences == [
        "20 labels of 30 that the run waits for, of 10 pairs; 19 prefer one of the two answers.",
        "ann with their own repeated labels: 2 pairs, 50% equal, κ 0.00.",
        "ann and bob: 10 pairs, 80% equal, κ 0.64.",
    ]
    (_, columns, rows), (_, _, agreements) = labelled.tables
    assert columns[-3:] == ["labels", "shown again", "comments"]
    assert rows == [
        ("ann", ["5", "4", "1", "0", "0", "10", "2", "0"]),
        ("bob", ["4", "6", "0", "0", "0", "10", "0", "1"]),
    ]
    assert agreements[1] == ("ann and bob", ["10", "80%", "0.64"])
    assert labelled.shown(1)[0]["comment"] == EVIL, "comments come first"


def test_the_page_shows_them_escaped(run):
    client = TestClient(make_app([run.path.parent]), base_url="http://127.0.0.1:8700")
    text = client.get(f"/run/{run.name}/labels").text
    assert EVIL not in text and "&lt;script&gt;alert(1)" in text
    plain = re.sub(r"<[^>]*>", " ", text)
    assert (
        "κ 0.64" in plain
        and "prompt 3" in plain
        and plain.index("prompt 3") < plain.index("prompt 9")
    )


def test_a_damaged_file_is_a_sentence(run, tmp_path):
    file = run.path / "label" / "labels.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([b"{}", *lines]))
    assert "labels.jsonl:1: is no label" in labelled_run(run).problems[0]
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert "a link" in labelled_run(run).problems[0]
    client = TestClient(make_app([run.path.parent]), base_url="http://127.0.0.1:8700")
    assert "a link" in client.get(f"/run/{run.name}/labels").text
