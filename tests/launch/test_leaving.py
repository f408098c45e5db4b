"""However a run of several ranks ends, rank 0 leaves its process group: NCCL warns of one that is left to the interpreter's end,
and may hang in it."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from quartet.distributed import process_group as groups
from quartet.distributed.process_group import TorchProcessGroup
from quartet.errors import NonFinite
from quartet.io.threads import left_behind
from quartet.launch.spmd import ProcessWorkers
from tests.launch.test_launch import Doubles, at_step, followers
from tests.support.command import PROJECT
from tests.support.tiny_run import SMALL

WORDS = ["run", "sums", *SMALL, "policy.create.max_length=32", 'recipe=["sft", "grpo"]']
WORDS += ["run.steps=400", "launch.processes=2", "launch.deadline=60", "run.name=x"]
TOGETHER, ALONE = ["destroy_process_group"], ["_abort_process_group"]


def begun(folder, *words):
    command = [sys.executable, "-m", "tests.support.leaving", str(folder / "left.json")]
    paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, *WORDS, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip


def stop(folder, process):
    at_step(folder, process, "grpo", 2)
    process.send_signal(signal.SIGTERM)


def kill_the_other(folder, process):
    at_step(folder, process, "grpo", 2)
    os.kill(followers(process)[1], signal.SIGKILL)


ENDS = {
    "finished": (["run.steps=1"], None, 0, TOGETHER),
    "stopped between two calls": ([], stop, 75, TOGETHER),
    "an error": (["reward=[{type='function', function='r.py:odd'}]"], None, 1, ALONE),
    "a lost rank": ([], kill_the_other, 75, ALONE),
    "refused": (["policy.model=nowhere", "policy.create=none"], None, 2, []),
}
FAST = {"an error"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=[pytest.mark.slow] * (end not in FAST)) for end in ENDS]
)
def test_rank_zero_leaves_however_a_run_ends(tmp_path, end):
    words, act, code, calls = ENDS[end]
    (tmp_path / "r.py").write_text("def odd(responses):\n    return [1.0]\n")
    process = begun(tmp_path, *words)
    if act is not None:
        act(tmp_path, process)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    left = json.loads((tmp_path / "left.json").read_text())
    # which of both a signal meets, a call or the time between two, is chance
    may_be_either = end == "stopped between two calls"
    assert left["is_left"] and (
        left["calls"] == calls or (may_be_either and left["calls"] == ALONE)
    )


@pytest.mark.long
def test_a_program_can_run_twice_and_go_on(tmp_path):
    """Each start joins a new group, over which models are divided anew."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.twice", str(tmp_path)], capture_output=True, text=True,
        cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("three runs\n"), done.stderr[-2000:]


# --- in threads


class Group(TorchProcessGroup):
    def __init__(self, seen):
        super().__init__(0, 2)
        self.seen = seen

    def leave(self, in_step):
        self.seen.append(("leaves", in_step))


class Follower:
    rank = 1

    def __init__(self, seen):
        self.process, self.seen = self, seen

    def poll(self):
        return None

    def kill(self):
        self.seen.append("killed")

    def end(self):
        self.seen.append("waited for")


class Failing(Doubles):
    def lose(self):
        raise RuntimeError("gloo: connection closed by peer")

    def diverge(self):
        raise NonFinite("the loss")

    def stop(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (None, None, [("leaves", True), "waited for"]),
        ("diverge", NonFinite, [("leaves", True), "waited for"]),
        ("lose", Exception, [("leaves", False), "waited for"]),
        ("stop", KeyboardInterrupt, ["killed", ("leaves", False), "waited for"]),
    ],
)
def test_it_leaves_before_it_waits_for_the_others(monkeypatch, call, error, expected):
    """They leave at the same time, and NCCL ends no communicator before the other rank does."""
    monkeypatch.setattr("quartet.launch.spmd.SILENCE", 0.1)
    monkeypatch.setattr("quartet.launch.spmd.BEAT", 0.05)
    seen = []
    group = ProcessWorkers(Failing(), dist.HashStore(), 2, 1.0, process_group=Group(seen))
    group.followers = [Follower(seen)]
    if call is not None:
        with pytest.raises(error):
            group.call(call)
    monkeypatch.setattr("quartet.launch.spmd.SILENCE", 60.0)
    group.close()
    assert seen == expected


@pytest.fixture
def alone(tmp_path):
    group = TorchProcessGroup(0, 1)
    group.join(dist.FileStore(str(tmp_path / "store"), 1), 10.0, torch.device("cpu"))
    yield group
    if dist.is_initialized():
        dist.destroy_process_group()


def test_leaving_ends_the_group_and_may_be_asked_for_twice(alone, tmp_path):
    alone.leave(in_step=True)
    assert not dist.is_initialized()
    alone.leave(in_step=True)
    alone.join(dist.FileStore(str(tmp_path / "again"), 1), 10.0, torch.device("cpu"))
    alone.leave(in_step=False)
    assert not dist.is_initialized()


def test_an_end_that_hangs_is_given_up(alone, monkeypatch, caplog):
    hanging = threading.Event()
    monkeypatch.setattr(groups, "LEAVING", {True: 0.1, False: 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "destroy_process_group", hanging.wait)
        alone.leave(in_step=True)
    assert "cannot end its communicators" in caplog.text and len(left_behind()) == 1
    hanging.set()
    for thread in left_behind():
        thread.join(10)
    assert not left_behind()
