"""The thread that a worker computes in."""

import threading

import pytest

from quartet.io.threads import BackgroundThread
from quartet.runtime.worker import WorkerThread


class Worker:
    """A worker whose step lasts until it is released."""

    def __init__(self):
        self.released, self.begun = threading.Event(), threading.Event()

    def step(self):
        self.begun.set()
        self.released.wait(30)

    def save(self):
        return threading.current_thread().name

    def fails(self):
        raise ValueError("no")


def test_a_state_is_saved_though_the_interruption_came_while_the_step_was_handed_over(monkeypatch):
    """The step is in its thread, and its caller has not heard of that: the save must not wait behind it."""
    worker, start = Worker(), BackgroundThread.start

    def interrupted(self, function):
        start(self, function)
        raise KeyboardInterrupt

    thread = WorkerThread(worker)
    monkeypatch.setattr(BackgroundThread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.call("step")
    monkeypatch.setattr(BackgroundThread, "start", start)
    assert worker.begun.wait(30)
    saved = []
    saving = threading.Thread(target=lambda: saved.append(thread.call("save")), daemon=True)
    saving.start()
    saving.join(20)
    assert saved == ["worker, after an interruption"]
    with pytest.raises(ValueError, match="no"):
        thread.call("fails")
    assert thread.call("save") == "worker, after an interruption"  # the step still is under way
    worker.released.set()
    thread.close()


def test_without_an_interruption_one_thread_makes_all_calls():
    thread = WorkerThread(Worker())
    assert thread.call("save") == "worker"
    with pytest.raises(ValueError, match="no"):
        thread.call("fails")
    assert thread.call("save") == "worker"
    thread.close()
