"""Signals and a time limit, which stop a run at a point where no work is lost."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REASONS = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGALRM": "run.max_minutes"}
"""What each signal is called in messages; SIGALRM is the timer of the time limit."""
SIGNALS = [getattr(signal, name) for name in REASONS if hasattr(signal, name)]
"""The signals that are handled; Windows has no SIGALRM."""


def never() -> bool:
    """Return False: a condition for `Interruption.only_if`."""
    return False


def always() -> bool:
    """Return True: a condition for `Interruption.only_if`."""
    return True


class Interrupted(BaseException):
    """Raised to stop a run. The message names the signal or the limit that stopped it."""


class Interruption:
    """A context manager that turns SIGINT, SIGTERM and a time limit into `Interrupted`.

    A signal within `only_if` raises at once if the condition given there holds. Any other signal is
    kept, `notice` is called with its name, and the next `check` raises. A second signal always
    raises at once.
    """

    def __init__(
        self, minutes: float | None = None, notice: Callable[[str], None] | None = None
    ) -> None:
        """`minutes` is the time limit, counted from now; None for no limit."""
        self.minutes, self.notice, self._began = minutes, notice, time.monotonic()
        self.reason: str | None = None
        """The name of the first signal, once there was one."""
        self._may_raise: Callable[[], bool] = never
        self._old_handlers: dict[int, object] = {}

    def minutes_left(self) -> float | None:
        """Return the minutes until the time limit, at least 0.001; None if there is no limit."""
        if self.minutes is None:
            return None
        # Not 0, which means "not set" to the process that a restart passes it to.
        return max(self.minutes - (time.monotonic() - self._began) / 60, 0.001)

    def __enter__(self) -> "Interruption":
        self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
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
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def only_if(self, may_raise: Callable[[], bool]) -> Iterator[None]:
        """Within this context, let a signal raise at once if `may_raise()` holds when it arrives.
        Raises `Interrupted` on entry for a signal that was kept."""
        self.check()
        self._may_raise = may_raise
        try:
            yield
        finally:
            self._may_raise = never

    def check(self) -> None:
        """Raise `Interrupted` if a signal was kept."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second, self.reason = self.reason is not None, REASONS[signal.Signals(number).name]
        if is_second or self._may_raise():
            raise Interrupted(self.reason)
        if self.notice is not None:
            self.notice(self.reason)
