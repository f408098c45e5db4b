"""Several calls at once, and calls in the background, that are abandoned where the caller is
interrupted.

`concurrent.futures` waits for its threads when a pool is left and again when the interpreter exits,
so one call that hangs would hold a run that was told to stop. The threads here are daemons, and
nothing waits for them.
"""

import contextlib
import ctypes
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from quartet.io.activity import progress

T = TypeVar("T")
R = TypeVar("R")
RETRY_SECONDS = 1.0
"""How long a thread may take to end before it is told again."""
WAKE_SECONDS = 0.2
"""How often a thread that waits looks whether it was abandoned itself."""
_STARTING = threading.Lock()
"""Held while a thread is started. Until the new thread runs, Python 3.11 knows it by the identity
of the one that started it, and an exception raised in that one by its identity ends the new thread
before it has begun: then the starting thread would wait for it forever."""


def map_concurrently(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """Return what `function` returns for each item, in their order, from at most `workers` threads.

    Raises what the first call to fail has raised. Then, and where the caller is interrupted, calls
    that are under way are abandoned, and no further ones begin.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()
    for index in range(len(items)):
        waiting.put(index)

    def work() -> None:
        while not abandoned.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcomes.put((index, function(items[index]), None))
            except BaseException as error:
                outcomes.put((index, None, error))

    for _ in range(min(workers, len(items))):
        _start(threading.Thread(target=work, daemon=True))
    results: dict[int, R] = {}
    try:
        while len(results) < len(items):
            try:
                index, result, error = outcomes.get(timeout=WAKE_SECONDS)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[index] = result
            if len(items) > 1:
                progress(len(results), len(items), "calls")
    finally:
        abandoned.set()
    return [results[index] for index in range(len(items))]


def _start(thread: threading.Thread) -> None:
    with _STARTING:
        thread.start()


def result_of(future: "Future[R]", watch: Callable[[], None] = lambda: None) -> R:
    """Return the result of a future as `future.result()` does, in a thread that may itself be
    abandoned meanwhile. `watch` is called again and again while it waits, and may raise an
    error."""
    while not future.done():
        wait([future], WAKE_SECONDS)
        watch()
    return future.result()


class Abandoned(BaseException):
    """Raised in a background thread whose result is no longer wanted."""


class BackgroundThread:
    """One thread that makes the calls it is given, one after the other, while its owner does
    something else. It begins on the CUDA device of its owner's thread: by itself it would be on the
    first one, and FSDP, NCCL and CUDA graphs take the current device's streams."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._started_by = threading.current_thread()
        self._is_abandoned = False
        _start(self._thread)
        _BACKGROUND.add(self)
        cuda = sys.modules.get("torch.cuda")  # where torch is not imported, there is no device
        if cuda is not None and cuda.is_initialized():
            self.start(partial(cuda.set_device, cuda.current_device()))

    def start(self, function: Callable[[], R]) -> "Future[R]":
        """Make a call after those that were started before."""
        future: Future[R] = Future()
        self._calls.put((future, function))
        return future

    def finish(self) -> None:
        """Wait for all calls that were started, and end the thread."""
        self._calls.put(None)
        self._thread.join()

    def abandon(self, seconds: float = 5.0) -> None:
        """End the thread in the middle of a call, and the background threads that it has started:
        `Abandoned` is raised there, as soon as a call into native code returns.

        That end is waited for, for so many seconds at most: Python ends a daemon thread that comes
        back from native code while the interpreter exits, and where the code is torch's this aborts
        the process. `left_behind` lists the threads that took longer.
        """
        family = [self]
        for parent in family:
            family += [b for b in list(_BACKGROUND) if b._started_by is parent._thread]
        deadline = time.monotonic() + seconds
        for background in family:
            background._is_abandoned = True
            background._calls.put(None)
        while (alive := [b for b in family if b._thread.is_alive()]) and (
            left := deadline - time.monotonic()
        ) > 0:
            for background in alive:
                background._tell(left)
            alive[0]._thread.join(min(left, RETRY_SECONDS))

    def _tell(self, seconds: float) -> None:
        """Raise `Abandoned` in the thread. Once may not be enough: a thread that other code has
        just started may get it."""
        ident = ctypes.c_ulong(self._thread.ident or 0)
        if _STARTING.acquire(timeout=seconds):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Abandoned))
            _STARTING.release()

    def _work(self) -> None:
        with contextlib.suppress(Abandoned):
            while (call := self._calls.get()) is not None:
                future, function = call
                try:
                    future.set_result(function())
                except Abandoned:
                    raise
                except BaseException as error:
                    future.set_exception(error)
                del call, future, function  # what they refer to must not outlive its use


_BACKGROUND: "weakref.WeakSet[BackgroundThread]" = weakref.WeakSet()


def left_behind() -> list[threading.Thread]:
    """Return the background threads that were abandoned and still run: they are in native code."""
    return [b._thread for b in list(_BACKGROUND) if b._is_abandoned and b._thread.is_alive()]
