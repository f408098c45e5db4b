"""Programs that must do no harm, and tests that they must not be able to fool."""

import dataclasses
import shutil
import socket
import time

import pytest

from quartet.rewards import sandbox as module
from quartet.rewards.code import CodeReward, checked_tests, program_in, same_json
from quartet.rewards.protocol import RewardError
from quartet.rewards.sandbox import Sandbox
from tests.support.world import prompts, rollout

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap here")


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(seconds=5.0, memory_mb=256)


def answer(text, tests):
    one = rollout(prompts(1)[0], (5,), 0.0)
    return dataclasses.replace(
        one, response=text, prompt=dataclasses.replace(one.prompt, extra={"tests": tests})
    )


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
        ("print('1\\x0b2')", [{"input": "", "output": "1\n2"}], 0, 0),
        ("print('1\\u20282')", [{"input": "", "output": "1\n2"}], 0, 0),
        ("import os; os.write(1, b'\\xff')", [{"input": "", "output": "\ufffd"}], 0, 0),
        ("print('a  \\r')", [{"input": "", "output": "a"}], 1, 1),
        ("", ADD, 0, 0),
        ("def add(a, b): return True", [{"call": "add(1, 0)", "result": 1}], 0, 0),
        ("def add(a, b): return 1", [{"call": "add(1, 0)", "result": True}], 0, 0),
        (
            "def add(a, b): return [0.0, {'x': False}]",
            [{"call": "add(1, 0)", "result": [0, {"x": 0}]}],
            0,
            0,
        ),
        ("def add(a, b): return 1.0", [{"call": "add(1, 0)", "result": 1}], 1, 1),
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


@pytest.mark.slow
@needs_bwrap
def test_memory_disk_output_and_time_are_bounded(sandbox):
    assert (
        sandbox.run("try:\n    x = bytearray(10**9)\nexcept MemoryError:\n    print('no')").output
        == "no\n"
    )
    assert (
        "full"
        in sandbox.run(
            "try:\n    open('/tmp/x', 'wb').write(b'x' * 10**8)\nexcept OSError:\n    print('full')"
        ).output
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


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(1, 1.0, True), (1, True, False), (False, 0, False), (True, True, True), (None, None, True), ([1], [True], False),
     ({"a": [0]}, {"a": [0.0]}, True), ({"a": 0}, {"a": False}, False), ({"a": 1}, {"b": 1}, False), ([1, 2], [1], False), ("1", 1, False)],
)  # fmt: skip
def test_values_are_the_same_as_json(a, b, same):
    assert same_json(a, b) is same and same_json(b, a) is same


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
