"""Signals and a time limit, heard where nothing is lost by it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REASONS = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGALRM": "run.max_minutes"}
HEARD = [getattr(signal, name) for name in REASONS if hasattr(signal, name)]


def never() -> bool:
    return False


def always() -> bool:
    return True


class Interrupted(BaseException):
    """The run is to stop; the message is what stopped it."""


class Interruption:
    """While it is entered, SIGINT, SIGTERM and the time limit raise `Interrupted`: at once inside
    `only_if`, where that is so, elsewhere when `check` is called. A second signal raises wherever
    it finds the run."""

    def __init__(
        self, minutes: float | None = None, notice: Callable[[str], None] | None = None
    ) -> None:
        self.minutes, self.notice, self._began = minutes, notice, time.monotonic()
        self.reason: str | None = None
        self._free: Callable[[], bool] = never
        self._before: dict[int, object] = {}

    def minutes_left(self) -> float | None:
        """Not quite none, so that a limit stays one."""
        return (
            None
            if self.minutes is None
            else max(self.minutes - (time.monotonic() - self._began) / 60, 0.001)
        )

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._hear) for number in HEARD}
        if self.minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def only_if(self, free: Callable[[], bool]) -> Iterator[None]:
        """Inside, a signal raises at once while this is true; so does one that was heard before."""
        self.check()
        self._free = free
        try:
            yield
        finally:
            self._free = never

    def check(self) -> None:
        """Raise what was heard and not raised."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.reason = self.reason is not None, REASONS[signal.Signals(number).name]
        if again or self._free():
            raise Interrupted(self.reason)
        if self.notice is not None:
            self.notice(self.reason)
