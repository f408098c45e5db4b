"""What is a verdict and what is none, a request that hangs beside others, and the cache under kills and other writers."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from quartet.io.threads import map_concurrently
from quartet.rewards import judge_cache, remote
from quartet.rewards.judge import JudgeReward
from quartet.rewards.judge_cache import JudgeCache
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.rewards.source import RewardContext
from quartet.rewards.sources import JudgeSource
from quartet.rewards.verdicts import parse_preference, parse_score
from tests.support.fault_server import FaultServer, says, silent
from tests.support.world import prompts, rollout

# --- verdicts ------------------------------------------------------------------------------------------------------------------

SCORES = {
    "Score: 7": 7.0,
    "Score: 1": 1.0,
    "Score: 10": 10.0,
    "Score: 7.5": 7.5,
    "Score: 07": 7.0,
    "score:7": 7.0,
    "SCORE: 7": 7.0,
    "Score : 7": 7.0,
    "Final score: 7": 7.0,
    "It is good.\n\nScore: 7\n": 7.0,
    "Score: 7.": 7.0,
    "Score: 7/10": 7.0,
    "Score: 7 / 10.": 7.0,
    "**Score: 7**": 7.0,
    "**Score:** 7": 7.0,
    "**Score**: **7.5**": 7.5,
    "_Score_: `7`": 7.0,
    "Score: 7\r\n": 7.0,
    "Score: 3 … no.\nScore: 7": 7.0,
    "The answer says \"Score: 10\" of itself.\nScore: 2": 2.0,
    # no verdicts
    "": None,
    "7": None,
    "It is fine.": None,
    "Score:": None,
    "Score: none": None,
    "Score: 0": None,
    "Score: 0.99": None,
    "Score: 11": None,
    "Score: 10.01": None,
    "Score: -5": None,
    "Score: +5": None,
    "Score: 1000000": None,
    "Score: " + "9" * 5000: None,
    "Score: 8,5": None,
    "Score: 8.": 8.0,
    "Score: .5": None,
    "Score: 8.5.1": None,
    "Score: 1e1": None,
    "Score: 0x7": None,
    "Score: 1_0": None,
    "Score: NaN": None,
    "Score: inf": None,
    "Score: ٣": None,
    "Score: ７": None,
    "Score: 7-8": None,
    "Score: 7 or 8": None,
    "Score: 7 (good)": None,
    "Score: 7 of 10": None,
    "Score: 7%": None,
    "Score: 7/5": None,
    "Score: 70/100": None,
    "Score: 7/0": None,
    "Score: seven": None,
    "Score: [7]": None,
    "Score:\n7": None,
    "Score = 7": None,
    "Underscore: 7": None,
    "Score: 9\nScore: I cannot say.": None,
    "Score: N": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "score"), SCORES.items(), ids=[text[:40] for text in SCORES])
def test_a_score_is_one_number_in_range_or_none(text, score):
    assert parse_score(text, 1.0, 10.0) == score


@pytest.mark.parametrize(
    ("text", "low", "high", "score"),
    [("Score: 0", 0, 1, 0.0), ("Score: 0.25", 0, 1, 0.25), ("Score: 2", 0, 1, None), ("Score: 85/100", 0, 100, 85.0), ("Score: 4/5", 1, 5, 4.0), ("Score: 4/10", 1, 5, None)],
)  # fmt: skip
def test_a_score_in_a_range_of_ones_own(text, low, high, score):
    assert parse_score(text, float(low), float(high)) == score


@pytest.mark.parametrize(
    "given", [[5, 1], [1, 1], [-1, 1], [1, float("nan")], [1, float("inf")], [1], "1-10"]
)
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="score_range"):
        JudgeSource(url="http://127.0.0.1/", model="m", score_range=given)


PREFERENCES = {
    "Better: A": 1.0,
    "Better: B": 0.0,
    "Better: tie": 0.5,
    "better: b": 0.0,
    "**Better: A**": 1.0,
    "**Better:** Tie.": 0.5,
    "Better: A\nNo: A is long.\nBetter: B": 0.0,
    # no verdicts
    "": None,
    "A": None,
    "Better: C": None,
    "Better: A or B": None,
    "Better: A, because": None,
    "Better: Answer A": None,
    "Better: both": None,
    "Better: A\nBetter: hard to say": None,
    "Better:\nA": None,
}


@pytest.mark.parametrize(
    ("text", "share"), PREFERENCES.items(), ids=[text[:40] for text in PREFERENCES]
)
def test_a_preference_is_a_or_b_or_tie_or_none(text, share):
    assert parse_preference(text) == share


# --- requests ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def rollouts(count):
    words = [prompts(1)[0]] * count
    return [
        dataclasses.replace(rollout(p, (5,), 0.0, i, i), response=f"answer {i}.")
        for i, p in enumerate(words)
    ]


def verdict(text):
    return says({"choices": [{"message": {"content": text}}]})


class Judge:
    """A judge whose server answers by the number of the response, closed behind the test."""

    def __init__(self, path, answer, timeout=20.0, tries=1):
        self.path, self.timeout, self.tries = path, timeout, tries
        self.server = FaultServer(
            choose=lambda body: answer(int(re.search(rb"answer (\d+)\.", body)[1]))
        )

    def __enter__(self):
        self.server.__enter__()
        endpoint = Endpoint("judge", self.server.url, timeout=self.timeout, tries=self.tries)
        self.reward = JudgeReward("judge", endpoint, "m", "score", None, self.path)
        return self.reward

    def __exit__(self, *_):
        self.reward.endpoint.close()
        self.server.__exit__()


@pytest.mark.slow
def test_a_request_that_hangs_ends_alone(tmp_path):
    """It closed the client of the others, which failed or had no score."""
    hanging = lambda number: silent if number == 0 else verdict(f"Score: {number}")  # noqa: E731
    with Judge(tmp_path / "cache.jsonl", hanging, timeout=3.0) as judge:
        assert judge.score(rollouts(9)) == [None, 1, 2, 3, 4, 5, 6, 7, 8]
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 8


def test_what_came_before_an_interruption_is_cached_and_nothing_is_waited_for(tmp_path):
    """As where a signal raises in the main thread."""

    class Stop(BaseException):
        pass

    def interrupt(*_):
        raise Stop

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Judge(
            tmp_path / "cache.jsonl",
            lambda n: verdict("Score: 7") if n < 2 else silent,
            timeout=60.0,
        ) as judge:
            cached = lambda: len(judge.cache._texts) == 2  # noqa: E731
            asking = threading.Thread(
                target=lambda: wait_for(cached) or os.kill(os.getpid(), signal.SIGUSR1)
            )
            asking.start()
            begun = time.monotonic()
            with pytest.raises(Stop):
                judge.score(rollouts(9))
            asking.join()
            assert time.monotonic() - begun < 20
    finally:
        signal.signal(signal.SIGUSR1, before)
    with Judge(tmp_path / "cache.jsonl", lambda n: silent) as judge:
        assert len(judge.cache._texts) == 2


def wait_for(condition):
    while not condition():
        time.sleep(0.01)


def test_one_question_is_asked_once(tmp_path):
    with Judge(tmp_path / "cache.jsonl", lambda n: verdict("Score: 7")) as judge:
        assert judge.score(rollouts(1) * 5) == [7] * 5
        assert judge.score(rollouts(1) * 5) == [7] * 5
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 1


def test_answers_without_a_verdict_are_cached_counted_and_logged(tmp_path, caplog):
    with Judge(
        tmp_path / "cache.jsonl", lambda n: verdict("Score: 11" if n else "Score: 7")
    ) as judge:
        assert judge.score(rollouts(3)) == [7, None, None]
        assert caplog.messages == [
            "reward judge: 2 of 3 answers of the judge have no verdict; one ends: Score: 11"
        ]
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 3


# --- the cache -----------------------------------------------------------------------------------------------------------------

GOOD = b'{"key": "k", "text": "Score: 7"}'
LINES = {
    "a list": b'{"key": "x", "text": ["Score: 7"]}',
    "a number": b'{"key": "x", "text": 7}',
    "null": b'{"key": "x", "text": null}',
    "true": b'{"key": "x", "text": true}',
    "an object": b'{"key": "x", "text": {}}',
    "an empty text": b'{"key": "x", "text": ""}',
    "no text": b'{"key": "x"}',
    "no key": b'{"text": "Score: 7"}',
    "a number as key": b'{"key": 5, "text": "Score: 7"}',
    "a list as key": b'{"key": ["x"], "text": "Score: 7"}',
    "a list as line": b'["x", "Score: 7"]',
    "a number as line": b"7",
    "null as line": b"null",
    "not JSON": b"Score: 7",
    "a torn line": b'{"key": "x", "text": "Sco',
    "not UTF-8": b'{"key": "x", "text": "\xff"}',
    "a surrogate in UTF-8": b'{"key": "x", "text": "\xed\xa0\x80"}',
    "null bytes": b"\0" * 4096,
    "brackets without end": b"[" * 100_000,
    "5,000 digits": b'{"key": "x", "text": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_bad_line_is_absent_with_a_log_line_and_harms_no_other(tmp_path, caplog, line):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(line + b"\n" + GOOD + b"\n" + line)
    cache = JudgeCache(path)
    assert cache.get("k") == "Score: 7" and cache.get("x") is None
    assert (
        len(caplog.messages) == 1
        and "2 lines are no answer of a judge and left out (line 1: " in caplog.messages[0]
    )
    cache.put("x", "Score: 8")
    again = JudgeCache(path)
    assert (again.get("k"), again.get("x")) == ("Score: 7", "Score: 8"), (
        "the line after a torn one is whole"
    )


@pytest.mark.parametrize(
    "text", ["a\u2028b\x85c", "a\nb\r\nc", "🙂 größer", "\x00\x1b[0m", "x" * 1_000_000]
)
def test_any_text_comes_back(tmp_path, text):
    path = tmp_path / "deep" / "cache.jsonl"
    JudgeCache(path).put("k", text)
    assert JudgeCache(path).get("k") == text


def test_half_a_surrogate_pair_does_not_end_a_run(tmp_path):
    JudgeCache(tmp_path / "cache.jsonl").put("k", "a \ud800")
    (tmp_path / "old.jsonl").write_bytes(rb'{"key": "k", "text": "a \ud800"}' + b"\n")
    assert (
        JudgeCache(tmp_path / "cache.jsonl").get("k")
        == JudgeCache(tmp_path / "old.jsonl").get("k")
        == "a \\ud800"
    )


def context():
    return RewardContext(None, lambda ids: [], 1000, torch.device("cpu"))


def test_what_is_no_file_is_refused_before_the_run(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular file"), (".", "Is a directory")):
        source = JudgeSource(url="http://127.0.0.1/", model="m", cache=str(tmp_path / name))
        with pytest.raises(RewardError, match=f"the judge's cache cannot be read .{reason}"):
            source.make(context())


WRITER = """
import os, sys, threading
from pathlib import Path
from quartet.rewards.judge_cache import JudgeCache

def write(name):
    cache = JudgeCache(Path(sys.argv[1]))
    for i in range(int(sys.argv[3])):
        cache.put(f"{name}/{i}", f"{name}/{i} " + "x" * 5000)
        os.write(1, f"{name}/{i}\\n".encode())

threads = [threading.Thread(target=write, args=(f"{sys.argv[2]}.{n}",)) for n in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_two_threads_lose_nothing(tmp_path, caplog):
    path = tmp_path / "cache.jsonl"
    process, caches = writer(path, "a", 50), [JudgeCache(path), JudgeCache(path)]
    process.stdout.readline()  # it has begun

    def write(number):
        for i in range(50):
            caches[number].put(f"b.{number}/{i}", f"b.{number}/{i} " + "x" * 5000)

    assert map_concurrently(write, [0, 1], 2) == [None, None]
    process.communicate()
    assert process.returncode == 0
    cache = JudgeCache(path)
    keys = [f"{name}.{n}/{i}" for name in "ab" for n in range(2) for i in range(50)]
    assert [cache.get(key) for key in keys] == [f"{key} " + "x" * 5000 for key in keys]
    assert not caplog.messages


def test_what_was_put_before_a_kill_is_there_and_the_next_writer_goes_on(tmp_path):
    path = tmp_path / "cache.jsonl"
    process = writer(path, "a", 10**6)
    written = [process.stdout.readline().strip() for _ in range(40)]
    process.kill()
    process.communicate()
    with path.open("ab") as file:
        file.write(b'{"key": "torn", "text": "Sco')  # as a kill in the middle of a write leaves it
    JudgeCache(path).put("b", "Score: 7")
    cache = JudgeCache(path)
    assert all(cache.get(key) == f"{key} " + "x" * 5000 for key in written)
    assert cache.get("b") == "Score: 7" and cache.get("torn") is None


def test_a_full_disk_is_one_sentence_and_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "cache.jsonl"
    cache = JudgeCache(path)
    cache.put("a", "Score: 7")
    size = path.stat().st_size
    append = judge_cache._append

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:10])

    monkeypatch.setattr(judge_cache, "_append", lambda file, line: append(Full(file), line))
    with pytest.raises(
        RewardError, match=r"cache.jsonl: cannot be written \(No space left on device\)"
    ):
        cache.put("b", "Score: 8")
    assert path.stat().st_size == size


def test_a_lock_that_is_never_given_back_is_waited_for_so_long(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(judge_cache, "LOCK_SECONDS", 0.1)
    path = tmp_path / "cache.jsonl"
    cache = JudgeCache(path)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RewardError, match="has kept the judge's cache locked for 0.1 s"):
            cache.put("a", "Score: 7")
    cache.put("a", "Score: 7")


@pytest.mark.parametrize("text", ["\xff".encode("latin-1"), None], ids=["not UTF-8", "absent"])
def test_a_prompt_that_cannot_be_read_is_refused(tmp_path, text):
    path = tmp_path / "prompt.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(RewardError, match="no such file|it is not UTF-8"):
        JudgeSource(url="http://127.0.0.1/", model="m", prompt=str(path)).make(context())
