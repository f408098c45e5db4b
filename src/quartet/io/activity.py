"""What this process is doing now and how far it has come, for a screen to show.

Code that may take seconds is wrapped in `activity`, and its loops call `progress`. A screen calls
`activities` from another thread. Nothing is printed here.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Number = int | float
BYTES_PER_MB = 1e6


@dataclass
class Activity:
    """One thing that is being done."""

    what: str
    """In one or two words: "sampling"."""
    since: float
    """When it began, on the monotonic clock."""
    counting_since: float
    """When the present count began."""
    done: float = 0.0
    total: float = 0.0
    """0 where it is not known."""
    unit: str = ""
    """What is counted; empty where nothing is."""
    measure: Callable[[], float] | None = None
    """Returns what is done, where no loop can say it."""

    def rename(self, what: str) -> None:
        """Say that the next part of the same work is done, which is counted anew."""
        self.what, self.done, self.total, self.unit = what, 0.0, 0.0, ""
        self.counting_since = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.monotonic() - self.since

    def in_words(self) -> str:
        """Return the name, with what is done, its total and its rate where they are known.

        >>> began = time.monotonic() - 10
        >>> Activity("centring", began, began, 300, 800, "tokens").in_words()
        'centring 300/800 tokens, 30/s'
        """
        done = self.done if self.measure is None else self.measure()
        if not self.unit or not done:
            return self.what
        rate = done / max(time.monotonic() - self.counting_since, 1e-9)
        of = f"/{self.total:,.0f}" if self.total else ""
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        return f"{self.what} {done:,.0f}{of} {self.unit}, {shown}/s"


_STACKS: dict[int, list[Activity]] = {}
"""For each thread, what it is doing: the innermost last."""


@contextlib.contextmanager
def activity(
    what: str, total: Number = 0, unit: str = "", measure: Callable[[], float] | None = None
) -> Iterator[Activity]:
    """Say what is done within this context. Contexts may be nested."""
    stack = _STACKS.setdefault(threading.get_ident(), [])
    now = time.monotonic()
    stack.append(entry := Activity(what, now, now, 0.0, float(total), unit, measure))
    try:
        yield entry
    finally:
        stack.remove(entry)
        if not stack:
            _STACKS.pop(threading.get_ident(), None)


def progress(done: Number, total: Number, unit: str) -> None:
    """Say how far the innermost activity of this thread has come. Another count begins its time
    anew."""
    if not (stack := _STACKS.get(threading.get_ident())):
        return
    entry = stack[-1]
    if done < entry.done or entry.unit not in {"", unit}:
        entry.counting_since = time.monotonic()
    entry.done, entry.total, entry.unit = float(done), float(total), unit


def counted(
    items: Iterable[T], size: Callable[[T], Number], total: Number, unit: str
) -> Iterator[T]:
    """Yield the items; after each, add its size to the progress of the innermost activity."""
    done: Number = 0
    for item in items:
        yield item
        done += size(item)
        progress(done, total, unit)


@contextlib.contextmanager
def writing(what: str, path: Path, num_bytes: Number) -> Iterator[None]:
    """Say that a file or folder of so many bytes is written; how far it is, its size says."""
    with activity(what, num_bytes / BYTES_PER_MB, "MB", lambda: _size(path) / BYTES_PER_MB):
        yield


def _size(path: Path) -> float:
    try:
        files = [path] if path.is_file() else list(path.rglob("*"))
        return float(sum(file.stat().st_size for file in files))
    except OSError:  # it is being renamed
        return 0.0


def activities() -> list[list[Activity]]:
    """Return what each thread is doing: the outermost first, the threads by when they began it."""
    stacks = [list(stack) for stack in list(_STACKS.values())]
    return sorted((stack for stack in stacks if stack), key=lambda stack: stack[0].since)
