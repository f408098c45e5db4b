"""Pairs, the file of labels, who labels what next, and agreement."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from quartet.data import DataError
from quartet.data.files import rows
from quartet.data.label_pairs import read_pairs
from quartet.data.report import report
from quartet.data.shapes import read_examples
from quartet.labels.agreement import OWN, agreements, cohens_kappa
from quartet.labels.log import Label, LabelError, LabelLog, is_label_file, read_labels
from quartet.labels.pairs import Pair, all_pairs, distinct, in_order
from quartet.labels.session import AlreadyLabelled, BadLabel, LabelSession

PAIRS = [Pair(f"question {i}", f"good {i}", f"bad {i}") for i in range(6)]


def label(number, pair, verdict="a", labeller="ann", order="ab", **more):
    return Label(number, labeller, pair, verdict, order, **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def log(path):
    log = LabelLog(path)
    yield log
    with contextlib.suppress(OSError):  # a test has closed it
        log.close()


def reopened(log):
    log.close()
    return LabelLog(log.path)


def test_a_pair_has_one_id_whichever_answer_comes_first():
    assert Pair("q", "x", "y").id == Pair("q", "y", "x").id != Pair("q", "x", "z").id
    assert distinct(
        [Pair("q", "x", "y"), Pair("q", "y", "x"), Pair("q", "x", "x"), Pair("q", "x", " ")]
    ) == [Pair("q", "y", "x")]
    assert len(all_pairs("q", ["a", "b", "c", "d"])) == 6


def test_the_most_uncertain_pairs_come_first_and_the_seed_orders_the_rest():
    pairs = [Pair("q", "x", str(i), uncertainty=u) for i, u in enumerate((0.1, None, 0.7, 0.3))]
    assert [p.uncertainty for p in in_order(pairs, 0, True)] == [0.7, 0.3, 0.1, None]
    assert in_order(pairs, 0) == in_order(pairs[::-1], 0)
    assert len({tuple(p.id for p in in_order(PAIRS, seed)) for seed in range(5)}) > 1


def test_kappa_by_hand():
    first = ["a"] * 20 + ["b"] * 15 + ["a"] * 5 + ["b"] * 10
    second = ["a"] * 20 + ["b"] * 15 + ["b"] * 5 + ["a"] * 10
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(["a", "b"], ["a", "b"]) == 1
    assert cohens_kappa(["a", "b"], ["b", "a"]) == -1
    assert cohens_kappa(["a"], ["a"]) is None and cohens_kappa([], []) is None


def test_agreement_of_two_and_with_oneself_leaves_skips_out():
    labels = [
        *(label(f"1{i}", PAIRS[i], v) for i, v in enumerate(("a", "b", "skip", "tie"))),
        *(label(f"2{i}", PAIRS[i], v, "bob") for i, v in enumerate(("a", "a", "a", "tie"))),
        label("again", PAIRS[0], "b", repeat=True),
    ]
    own, both = agreements(labels)
    assert (own.first, own.second, own.pairs, own.agreement) == ("ann", OWN, 1, 0.0)
    assert (both.first, both.second, both.pairs) == ("ann", "bob", 3)
    assert both.agreement == pytest.approx(2 / 3)
    assert both.kappa == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))  # (1·2 + 1·0 + 1·1) / 9 = 1/3
    assert "κ 0.50" in both.sentence()


def test_a_label_is_a_comparison_and_what_prefers_none_is_left_out_and_counted(log, path):
    for i, verdict in enumerate(("b", "a", "tie", "skip", "both_bad", "a")):
        log.add(label(str(i), PAIRS[i], verdict, comment="“hm”"))
    log.undo(label("5", PAIRS[5]))
    log.add(label("6", PAIRS[1], "b", repeat=True))
    log.add(label("7", PAIRS[0], "a", "bob"))
    assert [
        (e.id, e.prompt, e.chosen, e.rejected) for e in read_examples(path, "comparisons", {})
    ] == [
        ("labels.jsonl:1", "question 0", "bad 0", "good 0"),
        ("labels.jsonl:9", "question 0", "good 0", "bad 0"),
        ("labels.jsonl:2", "question 1", "good 1", "bad 1"),
    ]
    said = "labels.jsonl: 3 comparisons; left out: 1 ties, 1 both bad, 1 skipped, 1 repeated, 1 undone."
    summary = report(path, {})
    assert (
        summary.rows == 3 and summary.shapes == {"comparisons": 3} and summary.findings[0] == said
    )


def test_a_file_without_a_preference_says_so(log, path):
    log.add(label("0", PAIRS[0], "tie"))
    with pytest.raises(
        DataError,
        match=r"labels.jsonl: no label prefers an answer \(0 comparisons; left out: 1 ties\)",
    ):
        list(rows(path))


def test_a_torn_last_line_is_tolerated_reported_and_ended(log, path):
    log.add(label("0", PAIRS[0]))
    log.add(label("1", PAIRS[1]))
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1])):
        path.write_bytes(whole[: -1 - cut])
        assert [number for number, _ in read_labels(path).labels] == [1]
        assert "line 2 torn by a kill" in read_labels(path).sentence()
    log = reopened(log)
    log.add(label("2", PAIRS[2]))
    log = reopened(log)
    assert [entry.id for _, entry in log.labels.labels] == ["0", "2"] and log.labels.torn == (2,)
    assert len(list(rows(path))) == 2
    log.close()
    path.write_bytes(whole[:-1])  # the line is whole, only its end is missing
    log = LabelLog(path)
    assert [entry.id for _, entry in log.labels.labels] == ["0", "1"] and not log.labels.torn
    log.close()


def test_ending_a_torn_line_is_one_write(log, path, monkeypatch):
    log.add(label("0", PAIRS[0]))
    log.close()
    torn = path.read_bytes() + b'{"event": "la'
    path.write_bytes(torn)
    write, writes = os.write, []
    monkeypatch.setattr(os, "write", lambda file, line: writes.append(line) or write(file, line))
    LabelLog(path).close()
    assert len(writes) == 1 and path.read_bytes() == torn + writes[0]
    path.write_bytes(torn)
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))  # a full disk
    with pytest.raises(LabelError, match="could not be written"):
        LabelLog(path)
    assert path.read_bytes() == torn
    monkeypatch.undo()
    log = LabelLog(path)  # the failed one has given the lock back
    assert [entry.id for _, entry in log.labels.labels] == ["0"]
    log.close()


def test_a_file_whose_first_label_a_kill_has_torn_is_a_file_of_labels(log, path):
    log.close()
    path.write_bytes(b'{"event": "la')
    log = LabelLog(path)
    for i in range(2):
        log.add(label(str(i), PAIRS[i]))
    log.close()
    assert is_label_file(path) and len(read_labels(path).labels) == 2
    assert [row["prompt"] for _, row in rows(path)] == ["question 0", "question 1"]


@pytest.mark.parametrize("event", [{"a": 1}, ["label"], None, "label", "undo", "torn"], ids=str)
def test_rows_with_an_event_of_their_own_are_data(path, event):
    path.write_text(json.dumps({"prompt": "hi", "completion": "x", "event": event}))
    assert not is_label_file(path) and [row["event"] for _, row in rows(path)] == [event]
    path.write_text('{"event": "undo", "label": "1"}\n{"event": "undo", "label": {"a": 1}}')
    with pytest.raises(LabelError, match="labels.jsonl:2: is no label"):
        read_labels(path)


def test_damage_that_no_kill_leaves_is_refused(log, path):
    log.add(label("0", PAIRS[0]))
    line = path.read_text()
    path.write_text(line + "{oops\n" + line)
    with pytest.raises(LabelError, match="labels.jsonl:2: not JSON"):
        read_labels(path)
    path.write_text(line + line.replace('"verdict": "a"', '"verdict": "left"'))
    with pytest.raises(LabelError, match="labels.jsonl:2: verdict is 'left'"):
        read_labels(path)


def test_one_process_at_a_time_writes_a_file(log, path):
    with pytest.raises(LabelError, match="another process writes these labels"):
        LabelLog(path)


def test_a_killed_writer_loses_no_confirmed_label(path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.labels.test_labels import PAIRS, label\n"
        "from quartet.labels.log import LabelLog\nlog = LabelLog(Path(sys.argv[1]))\n"
        "for i in range(10000):\n    log.add(label(f'{sys.argv[2]}-{i}', PAIRS[0]))\n    print(f'{sys.argv[2]}-{i}', flush=True)\n"
    )
    confirmed = []
    for trial in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(trial)], stdout=subprocess.PIPE, text=True
        ) as writer:
            confirmed += [writer.stdout.readline().strip() for _ in range(20)]
            os.kill(writer.pid, signal.SIGKILL)
            confirmed += writer.stdout.read().split()
    written = [entry.id for _, entry in read_labels(path).labels]
    assert set(confirmed) <= set(written) and len(written) <= len(confirmed) + 2


def answer_all(session, labeller="ann", tab="t", choice="first"):
    given = []
    while (task := session.task(labeller, tab)) is not None:
        given.append(
            session.take(labeller, tab, f"{labeller}{len(session.labels)}", task.id, choice)
        )
    return given


def test_the_order_is_random_recorded_and_what_1_and_2_mean_follows_it(log):
    given = answer_all(LabelSession([Pair(f"q{i}", "x", "y") for i in range(40)], log, repeat=0.0))
    assert all((entry.verdict == "a") == (entry.order == "ab") for entry in given)
    assert 8 < sum(entry.order == "ab" for entry in given) < 32


def test_two_tabs_never_hold_the_same_pair_and_a_second_label_of_it_is_refused(log):
    session = LabelSession(PAIRS, log, repeat=0.0)
    one, two = session.task("ann", "t1"), session.task("ann", "t2")
    assert one.pair != two.pair and session.task("ann", "t1") == one
    restarted = LabelSession(PAIRS, log, repeat=0.0)  # no leases: both tabs still show a pair
    restarted.take("ann", "t2", "x1", one.id, "tie")
    with pytest.raises(AlreadyLabelled):
        restarted.take("ann", "t1", "x2", one.id, "first")
    again = restarted.take("ann", "t2", "x1", one.id, "second")  # sent twice: written once
    assert again.verdict == "tie" and len(log.path.read_text().splitlines()) == 1


def test_a_pair_of_a_closed_tab_comes_back(log):
    now = [0.0]
    session = LabelSession(PAIRS[:1], log, repeat=0.0, clock=lambda: now[0])
    task = session.task("ann", "t1")
    assert session.task("ann", "t2") is None
    session.release("t1")
    assert session.task("ann", "t2") == task
    now[0] = 901
    assert session.task("ann", "t3") == task


def test_a_page_that_is_loaded_again_keeps_its_pair_when_the_old_one_is_released_late(log):
    session = LabelSession(PAIRS, log, repeat=0.0)
    shown = session.task("ann", "t1", "load 1")
    assert session.task("ann", "t1", "load 2") == shown
    session.release("t1", "load 1")
    assert session.task("ann", "t2", "load 3") != shown
    session.release("t1", "load 2")
    assert session.task("ann", "t3", "load 4") == shown


def test_undo_is_a_line_and_gives_the_pair_back(log):
    session = LabelSession(PAIRS, log, repeat=0.0)
    first = session.task("ann", "t1")
    session.take("ann", "t1", "x", first.id, "first")
    other = session.task("ann", "t2")
    session.take("ann", "t2", "y", other.id, "first")
    assert session.last("ann", "t1") == "x" and session.last("bob", "t1") == ""
    assert session.undo("ann", "t1", "x") == first == session.task("ann", "t1")
    assert session.last("ann", "t1") == ""
    assert session.undo("ann", "t1", "y") is None  # that label is the other tab's
    assert [json.loads(line)["event"] for line in log.path.read_text().splitlines()] == [
        "label",
        "label",
        "undo",
    ]
    log = reopened(log)
    assert [entry.id for _, entry in log.labels.labels] == ["y"] and len(log.labels.undone) == 1
    assert len(LabelSession(PAIRS, log).labels) == 1
    log.close()


def test_an_undo_that_is_sent_twice_takes_one_label_back(log):
    session = LabelSession(PAIRS, log, repeat=0.0)
    tasks = []
    for number in ("x", "y"):
        tasks.append(session.task("ann", "t"))
        session.take("ann", "t", number, tasks[-1].id, "first")
    written = log.path.read_text()
    assert session.undo("ann", "t", "y") == tasks[1] == session.undo("ann", "t", "y")
    assert list(session.labels) == ["x"] and len(log.path.read_text().splitlines()) == 3
    log = reopened(log)  # the answer was lost with the server
    session = LabelSession(PAIRS, log, repeat=0.0)
    assert session.undo("ann", "t", "y") == tasks[1] and session.last("ann", "t") == "x"
    assert log.path.read_text().startswith(written) and len(session.labels) == 1
    log.close()


def test_a_pair_that_one_labeller_labels_is_not_labelled_by_a_second_one(log):
    now = [0.0]
    session = LabelSession(PAIRS, log, repeat=0.0, overlap=0.0, clock=lambda: now[0])
    task = session.task("ann", "a")
    now[0] = 901.0
    assert session.task("bob", "b").pair == task.pair
    session.take("bob", "b", "1", session.task("bob", "b").id, "tie")
    with pytest.raises(AlreadyLabelled, match="by someone else"):
        session.take("ann", "a", "2", task.id, "first")
    assert session.task("ann", "a").pair != task.pair


def test_the_id_of_a_pair_is_computed_once(monkeypatch):
    pair = Pair("q", "x", "y")
    first = pair.id
    monkeypatch.setattr(json, "dumps", None)
    assert pair.id == first and pair == Pair("q", "x", "y")


def test_repeats_come_after_a_gap_and_are_no_comparisons(log):
    pairs = [Pair(f"q{i}", "x", "y") for i in range(40)]
    session = LabelSession(pairs, log, repeat=0.25)
    given = answer_all(session)
    repeats = [i for i, entry in enumerate(given) if entry.repeat]
    assert len(repeats) == len(session.repeated) == len(given) - 40 > 3
    for i in repeats:
        first = next(j for j, entry in enumerate(given) if entry.pair == given[i].pair)
        assert i - first > 10 or i >= 40  # only at the end may the gap be shorter
    assert len(read_labels(log.path).comparisons()) == 40
    progress = session.progress("ann")
    assert progress.done == progress.total == len(given)


@pytest.mark.parametrize("seed", range(3))
def test_with_an_overlap_the_other_pairs_are_labelled_once(log, seed):
    pairs = [Pair(f"q{i}", "x", "y") for i in range(40)]
    session, draw = LabelSession(pairs, log, seed, repeat=0.0, overlap=0.3), random.Random(seed)
    open_tasks = {}
    for number in range(400):
        name = draw.choice(["ann", "bob"])
        if name in open_tasks and draw.random() < 0.5:
            session.take(name, name, str(number), open_tasks.pop(name).id, "tie")
        elif (task := session.task(name, name)) is not None:
            open_tasks[name] = task
    counts = {
        i: sum(entry.pair.id == i for entry in session.labels.values()) for i in session.pairs
    }
    assert {counts[i] for i in session.common} == {2} and {
        c for i, c in counts.items() if i not in session.common
    } == {1}


def test_bad_requests_are_refused_with_a_sentence(log):
    session = LabelSession(PAIRS, log)
    task = session.task("ann", "t").id
    for name, number, asked, choice, comment, sentence in (
        ("ann", "x", task, "left", "", "choice is 'left'"),
        ("ann", "x", "other", "tie", "", "no longer labelled here"),
        (" ", "x", task, "tie", "", "name"),
        ("a\u202eb", "x", task, "tie", "", "name"),
        ("ann", "x" * 99, task, "tie", "", "40 characters"),
        ("ann", "x", task, "tie", "c" * 3000, "comment"),
    ):
        with pytest.raises(BadLabel, match=sentence):
            session.take(name, "t", number, asked, choice, comment)
    assert log.path.read_text() == ""


def test_pairs_of_files(tmp_path):
    file = tmp_path / "pairs.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    file.write_text(
        "\n".join(
            json.dumps(row)
            for row in (
                {"prompt": "q", "answer_a": "x", "answer_b": "y"},
                {"prompt": "q", "answer_a": "y", "answer_b": "x"},
                {"prompt": "q", "answers": ["x", "y", "z"]},
                {"prompt": messages, "chosen": "good", "rejected": "bad"},
                {"prompt": "q", "answer_a": "x", "answer_b": "x"},
            )
        )
    )
    pairs = read_pairs(file)
    assert [(p.answer_a, p.answer_b) for p in pairs][1:3] == [("x", "z"), ("y", "z")] and len(
        pairs
    ) == 4
    assert pairs[3].answer_a == [{"role": "assistant", "content": "good"}]
    file.write_text('{"prompt": "q", "completion": "x"}')
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: has columns prompt, completion. Pairs need"
    ):
        read_pairs(file)
