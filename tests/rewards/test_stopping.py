"""A run that is told to stop while rewards are asked stops at once, leaves nothing running, and goes on from there."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from quartet.rewards.functions import descendants
from quartet.runs.reader import Run
from tests.support.tiny_run import SMALL

pytestmark = pytest.mark.slow

ALLOWED = 20.0
"""Seconds to the end of the process; a sleeping function used to take its own 60, a silent server its 30 and more."""


def wait_for(condition, process, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


def run_of(tmp_path, *words, output=subprocess.PIPE):
    small = [word for word in SMALL if not word.startswith(("sft.", "evaluation."))]
    command = [
        sys.executable,
        "-m",
        "quartet",
        "run",
        "sums",
        'recipe=["grpo"]',
        *small,
        "policy.create.max_length=32",
    ]
    return subprocess.Popen(
        [*command, "run.checkpoint_every=1", "run.steps=1", *words],
        cwd=tmp_path,
        stdout=output,
        stderr=output,
        text=True,
    )


def stopped(process, number):
    """Send a signal; return the seconds to the end, and what the run said."""
    below = descendants(process.pid)
    began = time.monotonic()
    process.send_signal(number)
    try:
        said, complaints = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    took = time.monotonic() - began
    assert process.returncode == 75 and "Nothing is lost" in said, (
        process.returncode,
        said,
        complaints,
    )
    time.sleep(0.2)
    assert not [pid for pid in below if pid in descendants(1)], (
        "nothing that the run started is left"
    )
    return took


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=lambda n: n.name,
)
def test_while_a_function_is_asked(tmp_path, number):
    file, mark = tmp_path / "mine.py", tmp_path / "asked"
    file.write_text(
        f"import os, time\ndef f(responses):\n    if os.path.exists({str(mark)!r} + '2'): return [1.0] * len(responses)\n"
        f"    open({str(mark)!r}, 'a').write('x'); time.sleep(60)\n    return [1.0] * len(responses)\n"
    )
    reward = f'reward=[{{type="function", function="{file}:f", timeout=100}}]'
    process = run_of(tmp_path, reward)
    wait_for(mark.exists, process)
    assert stopped(process, number) < ALLOWED
    (tmp_path / "asked2").touch()
    [folder] = (tmp_path / "runs").iterdir()
    command = [sys.executable, "-m", "quartet", "run", str(folder), "--resume"]
    again = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert Run(folder).status == "done"


def test_while_a_silent_server_is_asked(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/score"
        process = run_of(tmp_path, f'reward=[{{type="server", url="{url}", timeout=100}}]')
        accepted = []

        def asked():
            try:
                accepted.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        wait_for(asked, process)
        try:
            assert stopped(process, signal.SIGTERM) < ALLOWED
        finally:
            accepted[0].close()


@pytest.mark.long
def test_while_a_function_scores_rollouts_in_the_background_of_an_update(tmp_path):
    """The first signal is answered when the step is done, for which those rollouts are needed; the second at once."""
    file, mark, output = tmp_path / "mine.py", tmp_path / "asked", tmp_path / "output"
    file.write_text(
        "import time\ncalls = 0\ndef f(responses):\n    global calls\n    calls += 1\n"
        f"    if calls > 1:\n        open({str(mark)!r}, 'w').write('x'); time.sleep(100)\n    return [1.0] * len(responses)\n"
    )
    reward = f'reward=[{{type="function", function="{file}:f", timeout=200}}]'
    with output.open("w") as said:
        process = run_of(tmp_path, reward, "rollout.staleness=1", "run.steps=3", output=said)
        wait_for(mark.exists, process)
        below, began = descendants(process.pid), time.monotonic()
        process.send_signal(signal.SIGTERM)
        while process.poll() is None and "Once more stops at once" not in output.read_text():
            assert time.monotonic() - began < ALLOWED
            time.sleep(0.05)
        if process.poll() is None:  # the update had begun
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75 and time.monotonic() - began < 2 * ALLOWED
    assert "Nothing is lost" in output.read_text()
    assert not [pid for pid in below if pid in descendants(1)], (
        "nothing that the run started is left"
    )
