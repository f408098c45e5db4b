"""Several calls at once, and calls with a deadline, that are abandoned where the caller is interrupted.

`concurrent.futures` waits for its threads when a pool is left and again when the interpreter exits, so one call that hangs
would hold a run that was told to stop. The threads here are daemons, and nobody waits for them.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_concurrently(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """Return what `function` returns for each item, in their order, from at most `workers` threads.

    Raises what the first call to fail has raised. Then, and where the caller is interrupted, calls that are under way are
    abandoned, and no further ones begin.
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
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, R] = {}
    try:
        while len(results) < len(items):
            index, result, error = outcomes.get()
            if error is not None:
                raise error
            results[index] = result
    finally:
        abandoned.set()
    return [results[index] for index in range(len(items))]


def call_within(function: Callable[[], R], seconds: float) -> R:
    """Return what `function` returns, or raise what it raises; after `seconds`, raise `TimeoutError` and abandon the call."""
    outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcomes.put((function(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    found: R = result
    return found
