"""Threads that hold nobody: calls at once and in the background, abandoned where their owner is interrupted."""

import ctypes
import subprocess
import sys
import threading
import time

import pytest
import torch

from quartet.io.threads import BackgroundThread, map_concurrently, result_of

ALLOWED = 30.0
"""Seconds, where waiting for the threads would take 60 and more."""


def test_results_come_in_order_from_at_most_so_many_threads():
    seen, most, lock = [0], [0], threading.Lock()

    def call(number):
        with lock:
            seen[0] += 1
            most[0] = max(most[0], seen[0])
        time.sleep(0.01)
        with lock:
            seen[0] -= 1
        return number * number

    assert map_concurrently(call, range(20), 3) == [n * n for n in range(20)]
    assert most[0] <= 3 and map_concurrently(call, [], 3) == []


def test_the_first_failure_ends_the_waiting_and_begins_no_further_call():
    begun = []

    def call(number):
        begun.append(number)
        if number == 1:
            raise KeyError("one")
        time.sleep(0.2 if number else 60)

    began = time.monotonic()
    with pytest.raises(KeyError):
        map_concurrently(call, range(50), 2)
    assert time.monotonic() - began < 30
    time.sleep(0.5)
    assert len(begun) < 10


def test_the_interpreter_ends_though_a_call_does_not():
    code = (
        "import os, signal, threading, time\nfrom quartet.io.threads import map_concurrently\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells start jobs without it
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: map_concurrently(lambda _: time.sleep(120), [1, 2, 3], 2)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "interrupted\n" and done.returncode == 0, done.stderr


# --- calls in the background


def test_calls_in_the_background_are_made_in_order_and_give_results_or_errors():
    background, seen = BackgroundThread("test"), []
    futures = [background.start(lambda n=n: (seen.append(n), 1 // (n - 2))[1]) for n in range(4)]
    assert result_of(futures[3]) == 1 and seen == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        result_of(futures[2])
    background.finish()
    assert background.start(int) and seen == [0, 1, 2, 3]


def test_a_thread_begins_on_the_cuda_device_of_the_thread_that_starts_it(monkeypatch):
    """A new thread is on the first device, also in a rank whose models are on another."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    set_device = lambda number: chosen.append((threading.current_thread().name, number))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    background = BackgroundThread("rollouts")
    assert result_of(background.start(lambda: list(chosen))) == [("rollouts", 3)]
    background.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    "waiting",
    [
        lambda: map_concurrently(lambda _: time.sleep(120), [1, 2], 2),
        lambda: [time.sleep(0.001) for _ in range(100_000)],
        lambda: result_of(BackgroundThread("other").start(lambda: time.sleep(4))),
    ],
    ids=["calls at once", "a loop", "another thread"],
)
def test_a_thread_that_is_abandoned_ends_in_the_middle_of_its_call(waiting):
    background, ends, begun = BackgroundThread("test"), [], threading.Event()

    def call():
        try:
            begun.set()
            waiting()
        finally:
            ends.append("what had to be cleaned up was")

    background.start(call)
    begun.wait()
    began = time.monotonic()
    background.abandon(ALLOWED)
    assert ends and time.monotonic() - began < ALLOWED
    background.abandon(ALLOWED)  # a second time does no harm


@pytest.mark.slow
def test_a_thread_is_abandoned_while_it_starts_others():
    """One in six of these never ended when the exception went to the thread that was being started."""
    for _ in range(40):
        background, begun, ends = BackgroundThread("test"), threading.Event(), []

        def call(begun=begun, ends=ends):
            try:
                begun.set()
                map_concurrently(lambda _: time.sleep(3), [1, 2], 2)
            finally:
                ends.append("ended")

        background.start(call)
        begun.wait()
        background.abandon(ALLOWED)
        assert ends


def test_a_thread_that_missed_it_is_told_again(monkeypatch):
    """Python 3.11 may give the exception to a thread that the abandoned one has just started."""
    real, calls = ctypes.pythonapi.PyThreadState_SetAsyncExc, []

    def lost_once(ident, error):
        calls.append(ident)
        return real(ident, error) if len(calls) > 1 else 1

    class Python:
        PyThreadState_SetAsyncExc = staticmethod(lost_once)

    monkeypatch.setattr(ctypes, "pythonapi", Python)
    background, begun = BackgroundThread("test"), threading.Event()

    def call():
        begun.set()
        while True:
            time.sleep(0.01)

    background.start(call)
    begun.wait()
    background.abandon(ALLOWED)
    assert len(calls) == 2 and not background._thread.is_alive()


def test_the_interpreter_ends_as_it_was_told_though_torch_was_at_work_in_the_background():
    """Without the end of that thread torch aborts the process: exit code -6."""
    code = (
        "import sys, time, torch\nfrom quartet.io.threads import BackgroundThread\n"
        "def work():\n    a = torch.randn(200, 200)\n    while True: (a @ a).sort(dim=1)\n"
        "background = BackgroundThread('rollouts')\nbackground.start(work)\ntime.sleep(0.3)\n"
        "try: raise KeyboardInterrupt\nexcept KeyboardInterrupt: background.abandon()\nsys.exit(75)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 75, ended.stderr
