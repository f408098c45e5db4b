"""Reward functions that hang, hide children, close what they are asked through, or lie about being done."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from quartet.rewards.functions import FunctionReward, descendants
from quartet.rewards.protocol import RewardError
from tests.support.world import prompts, rollout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]

ALLOWED = 15.0
"""Seconds; each of these held a run with a limit of half a second for 25 to 60, or for ever."""
MARK = f"quartet_hanging_child_{os.getpid()}"

CHILD = f"[sys.executable, '-c', 'import time; time.sleep(300)', '{MARK}']"
HANGING = {
    "a child that holds the output": f"subprocess.Popen({CHILD}); time.sleep(300)",
    "a child, and then an exit": f"subprocess.Popen({CHILD}); os._exit(3)",
    "a child in a session of its own": f"subprocess.Popen({CHILD}, start_new_session=True); time.sleep(300)",
    "a grandchild whose parent is gone": f"subprocess.run([sys.executable, '-c', "
    f"'import subprocess, sys; subprocess.Popen([sys.executable, \"-c\", \"import time; time.sleep(300)\", \"{MARK}\"], start_new_session=True)']); time.sleep(300)",
    "a fork": "os.fork(); time.sleep(300)",
    "a pool": "import multiprocessing\n    with multiprocessing.get_context('fork').Pool(2) as pool: pool.map(time.sleep, [300, 300])",
    "threads that never end": "import threading\n    threading.Thread(target=time.sleep, args=(300,)).start(); time.sleep(300)",
    "closed descriptors, then sleep": "[os.close(fd) for fd in range(64) if fd_open(fd)]; time.sleep(300)",
    "closed output, then sleep": "os.closerange(0, 64); time.sleep(300)",
    "signals ignored": "import signal\n    [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 10, 12, 13, 15)]; time.sleep(300)",
    "output without an end of line": "[os.write(fd, b'x' * 100) for fd in range(3, 10) if writes(fd)]; time.sleep(300)",
    "a flood of prints": "while True: print('x' * 1000)",
    "a stop of itself": "import signal\n    os.kill(os.getpid(), signal.SIGSTOP)",
    "input that it reads itself": "sys.stdin.read(); time.sleep(300)",
}  # fmt: skip

HEAD = """import os, subprocess, sys, time
def fd_open(fd):
    try: os.fstat(fd); return True
    except OSError: return False
def writes(fd):
    try: os.write(fd, b''); return True
    except OSError: return False
class Rude(Exception):
    def __str__(self): raise RuntimeError("no words")
"""


def marked() -> list[str]:
    """Return the command lines of children that the functions above have started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if MARK in text and "import subprocess" not in text:
            found.append(text)
    return found


def all_ended() -> bool:
    """Return whether nothing runs any more that a function has started, within ten seconds: a process that was killed is there
    until the kernel comes to it."""
    until = time.monotonic() + 10
    while (descendants(os.getpid()) or marked()) and time.monotonic() < until:
        time.sleep(0.05)
    return descendants(os.getpid()) == [] and marked() == []


def reward_of(tmp_path, body, timeout=0.5):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}def f(responses):\n    {body}\n    return [1.0] * len(responses)\n")
    return FunctionReward("mine", f"{file}:f", lambda ids: [str(i) for i in ids], timeout)


def rows(count=2):
    return [rollout(p, (5, 6), 0.0, i, i) for i, p in enumerate(prompts(count))]


@pytest.mark.parametrize("body", HANGING.values(), ids=HANGING)
def test_a_function_that_hangs_is_ended_with_all_that_it_started(tmp_path, body):
    made = reward_of(tmp_path, body)
    process = made.workers[0].process
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"took longer than 0.5 s|its process (ended|closed)"):
        made.score(rows())
    assert time.monotonic() - began < ALLOWED
    assert process.poll() is not None
    assert all_ended()


def test_a_function_that_was_ended_is_started_again(tmp_path):
    body = "time.sleep(300) if not os.path.exists('once') and open('once', 'w') else None"
    made = reward_of(tmp_path, body.replace("once", str(tmp_path / "once")))
    with pytest.raises(RewardError, match="took longer"):
        made.score(rows())
    assert made.score([dataclasses.replace(r) for r in rows()]) == [1.0, 1.0]


def test_what_is_printed_in_no_encoding_does_not_block_the_function(tmp_path):
    made = reward_of(tmp_path, "os.write(2, b'\\xff\\xfe' * 200_000)", timeout=20.0)
    assert made.score(rows()) == [1.0, 1.0]


def test_half_a_surrogate_in_an_error_is_spelled_out(tmp_path):
    made = reward_of(tmp_path, "raise ValueError('bad \\ud800 text')", timeout=20.0)
    with pytest.raises(RewardError, match=r"bad \\ud800 text") as error:
        made.score(rows())
    str(error.value).encode("utf-8")


# --- functions that lie about being done

LYING = {
    "a fork that comes back, too": ("os.fork()", None),
    "a fork that raises": ("if os.fork() == 0: raise ValueError('in the child')", None),
    "a fork that exits": ("if os.fork() == 0: sys.exit(3)", None),
    "an answer of its own": ("[os.write(fd, b'{\"values\": [9, 9]}\\n') for fd in range(3, 10) if writes(fd)]", "no answer"),
    "an answer to another call": (
        "[os.write(fd, b'{\"number\": 1, \"values\": [9, 9]}\\n') for fd in range(3, 10) if writes(fd)]", "no answer",
    ),
    "words in place of an answer": ("[os.write(fd, b'done\\n') for fd in range(3, 10) if writes(fd)]", "no answer"),
    "another form of answer": ("[os.write(fd, b'[1]\\n') for fd in range(3, 10) if writes(fd)]", "no answer"),
    "an answer in no encoding": ("[os.write(fd, b'\\xff\\n') for fd in range(3, 10) if writes(fd)]", "no answer"),
    "a question to the terminal": ("input('continue?')", "EOFError"),
    "an exit that says that all is well": ("sys.exit(0)", "SystemExit: 0"),
    "an end that says that all is well": ("os._exit(0)", r"ended by itself \(exit code 0\)"),
    "a kill of itself": ("os.kill(os.getpid(), 9)", r"ended by itself \(exit code -9\)"),
    "an error of a million letters": ("raise ValueError('x' * 10**6)", "ValueError: x{2000} …"),
    "an error that cannot be printed": ("raise Rude()", "Rude"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), LYING.values(), ids=LYING)
def test_a_function_that_lies_gives_no_score_or_its_own(tmp_path, body, sentence):
    made = reward_of(tmp_path, body, timeout=20.0)
    for _ in range(2):  # the second call is not answered with what is left of the first
        if sentence is None:
            assert made.score(rows()) == [1.0, 1.0]
            continue
        with pytest.raises(RewardError, match=sentence) as error:
            made.score(rows())
        assert len(str(error.value)) < 3000
