"""Ranks that wait for rank 0, in real processes: as long as it lives, and no longer."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.support.waiting_rank import VALUE

pytestmark = pytest.mark.slow
LONG = 60.0
"""A deadline that no test waits for: what is noticed then was noticed by itself."""


@contextmanager
def ranks(tmp_path, deadline, kind):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.waiting_rank", str(rank), str(tmp_path / "store"), str(deadline), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate()


def test_they_wait_for_three_deadlines_and_say_so_and_hear_what_json_would_carry(tmp_path):
    with ranks(tmp_path, 3.0, "busy") as (lead, waiting):
        heard, noted = waiting.communicate(timeout=120)
        by_lead, silent = lead.communicate(timeout=20)
    expected = [VALUE, [{"rank": rank, **VALUE} for rank in range(2)]]
    assert json.loads(heard) == json.loads(by_lead)
    assert heard == by_lead == json.dumps(json.loads(json.dumps(expected))) + "\n"
    # after 3 seconds, and after more on a busy machine
    assert re.search(r"rank 1 has waited \d s for rank 0, which is alive and at work alone", noted)
    assert "has waited" not in silent


@pytest.mark.parametrize(
    ("kind", "deadline", "noticed"),
    [
        ("killed", LONG, r"Connection (closed|reset) by peer"),
        ("raises", LONG, r"RankZeroFailed: rank 0 has failed in what this rank waited for"),
        ("frozen", 3.0, r"[Tt]imed out"),
    ],
)
def test_they_notice_what_becomes_of_it(tmp_path, kind, deadline, noticed):
    """`True` at the end: rank 0 takes it for the error of another."""
    with ranks(tmp_path, deadline, kind) as (lead, waiting):
        heard, _ = waiting.communicate(timeout=55)
        if kind == "raises":
            assert lead.communicate(timeout=20)[0] == "ValueError: no servers (False)\n"
    assert re.search(noticed, heard) and heard.endswith("(True)\n"), heard
