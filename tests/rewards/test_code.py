"""Programs that must do no harm, and tests that they must not be able to fool."""

import dataclasses
import os
import shutil
import socket
import subprocess
import time

import pytest

from quartet.rewards import sandbox as module
from quartet.rewards.code import CodeReward, checked_tests, program_in
from quartet.rewards.protocol import RewardError
from quartet.rewards.sandbox import Sandbox, seccomp_filter
from tests.world import prompts, rollout

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap here")


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(seconds=5.0, memory_mb=256)


def answer(text, tests):
    one = rollout(prompts(1)[0], (5,), 0.0)
    return dataclasses.replace(one, response=text, prompt=dataclasses.replace(one.prompt, extra={"tests": tests}))


ADD = [{"call": "add(2, 3)", "result": 5}, {"call": "add('a', 'b')", "result": "ab"}]
ECHO = [{"input": "4\n", "output": "8\n"}, {"input": "0", "output": "0"}]


@needs_bwrap
@pytest.mark.parametrize(
    ("text", "tests", "score", "share"),
    [
        ("def add(a, b): return a + b", ADD, 1, 1),
        ("Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", ADD, 1, 1),
        ("def add(a, b): return 5", ADD, 0, 0.5),
        ("def add(a, b): return int(a) + int(b)", ADD, 0, 0.5),
        ("def add(a, b) return", ADD, 0, 0),
        ("print('noise')\ndef add(a, b):\n    print('more')\n    return a + b", ADD, 1, 1),
        ("print(2 * int(input()))", ECHO, 1, 1),
        ("print(int(input()) + 4)", ECHO, 0, 0.5),
        ("print(8)\nraise SystemExit(1)", ECHO, 0, 0),
        ("", ADD, 0, 0),
    ],
)
def test_programs_are_judged_by_what_they_compute(sandbox, text, tests, score, share):
    assert CodeReward("code", sandbox).score([answer(text, tests)]) == [score]
    assert CodeReward("code", sandbox, score="share").score([answer(text, tests)]) == [share]


@needs_bwrap
@pytest.mark.parametrize(
    "text",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import builtins\nprint('passed'); print('[5]'); print('1.0')",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[true]\\n[true]\\n')\n    except OSError: pass\ndef add(a, b): return True",
        "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()",
        "import json\njson.dumps = lambda x: '[true]'\ndef add(a, b): return 0",
        "import sys, __main__\n__main__.calls = []\nsys.modules['__main__'].__dict__['answers'] = None\ndef add(a, b): return 5",
    ],
)
def test_a_verdict_cannot_be_forged(sandbox, text):
    assert CodeReward("code", sandbox).score([answer(text, ADD)]) == [0]


@needs_bwrap
def test_a_fork_bomb_has_no_children(sandbox):
    ran = sandbox.run("import os\ntry:\n    os.fork()\nexcept OSError as e:\n    print(type(e).__name__, e.errno)")
    assert ran.output == "PermissionError 1\n"
    ran = sandbox.run("import subprocess\ntry:\n    subprocess.run(['/usr/bin/env'])\nexcept OSError as e:\n    print('no')")
    assert ran.output == "no\n"


@needs_bwrap
def test_threads_are_allowed(sandbox):
    ran = sandbox.run("import threading\nt = threading.Thread(target=print, args=('hello',))\nt.start(); t.join()")
    assert ran.output == "hello\n"


@needs_bwrap
def test_files_outside_cannot_be_written_and_secrets_not_be_read(sandbox, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    program = f"""
import os
for path in ({str(secret)!r}, '/etc/passwd', '/root/.ssh', '/home', os.path.expanduser('~/.bashrc')):
    print(os.path.exists(path))
for path in ('/usr/x', '/x', '/program.py', '/bin/x'):
    try:
        open(path, 'w'); print('written', path)
    except OSError: pass
print(dict(os.environ).keys() - {{'PWD', 'LC_CTYPE'}})
"""
    assert sandbox.run(program).output == "False\n" * 5 + "set()\n"


@needs_bwrap
def test_there_is_no_network(sandbox):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.5)
        port = server.getsockname()[1]
        program = f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 1); print('connected')\nexcept OSError: print('none')"
        assert sandbox.run(program).output == "none\n"
        with pytest.raises(TimeoutError):
            server.accept()


@needs_bwrap
def test_the_parent_can_neither_be_seen_nor_signalled_nor_read(sandbox):
    program = f"""
import os, ctypes
print(sorted(p for p in os.listdir('/proc') if p.isdigit()))
for pid in ({os.getpid()}, os.getppid()):
    for signal in (9, 15):
        try: os.kill(pid, signal)
        except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, {os.getpid()}, 0, 0), ctypes.get_errno())
try: open('/proc/{os.getpid()}/mem', 'rb'); print('read')
except OSError: print('none')
"""
    ran = sandbox.run(program)
    lines = ran.output.splitlines()
    assert len(eval(lines[0])) <= 3 and lines[1:] == ["-1 1", "none"], ran


@needs_bwrap
def test_memory_disk_output_and_time_are_bounded(sandbox):
    assert sandbox.run("try:\n    x = bytearray(10**9)\nexcept MemoryError:\n    print('no')").output == "no\n"
    assert (
        "full" in sandbox.run("try:\n    open('/tmp/x', 'wb').write(b'x' * 10**8)\nexcept OSError:\n    print('full')").output
    )
    flood = sandbox.run("while True: print('x' * 10000)")
    assert flood.code is None and len(flood.output) <= module.MAX_OUTPUT
    short = Sandbox(seconds=1.0)
    for program in (
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass",
    ):
        started = time.monotonic()
        assert short.run(program).code is None
        assert time.monotonic() - started < 10


@needs_bwrap
def test_nothing_is_left_running(sandbox):
    sandbox.run("import time\ntime.sleep(0.1)")
    short = Sandbox(seconds=0.5)
    short.run("import time\ntime.sleep(1234.5)")
    time.sleep(0.2)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert "/program.py" not in listed


def test_where_programs_cannot_be_isolated_none_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(RewardError, match="needs Linux and bubblewrap.*Without it no program is run"):
        Sandbox()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(broken))
    with pytest.raises(RewardError, match="cannot isolate programs here .bwrap: No permissions to create new namespace"):
        Sandbox()
    with pytest.raises(RewardError, match="not on riscv64"):
        seccomp_filter("riscv64")


def test_programs_are_found_in_answers():
    assert program_in("a\n```python\nx\n```\nb\n```\ny\n```") == "y\n"
    assert program_in("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("nonsense", "tests is text that is not JSON"),
        ([], "must be a list of tests, and not an empty one"),
        ([{"call": "f()"}], 'test 0 has neither "call" and "result" nor "input" and "output"'),
        ([{"input": 3, "output": "3"}], "test 0 has neither"),
    ],
)
def test_tests_that_are_none(cell, sentence):
    with pytest.raises(RewardError, match=sentence):
        checked_tests("p.jsonl:3", "tests", cell)
