"""Signals and a time limit, which stop a run within ten seconds, at a point where no work is lost
if there is one in that time."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REASONS = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGALRM": "run.max_minutes"}
"""What each signal is called in messages; SIGALRM is the timer of the time limit."""
SIGNALS = [getattr(signal, name) for name in REASONS if hasattr(signal, name)]
"""The signals that are handled; Windows has no SIGALRM."""
LEAVE_SECONDS = 10.0
"""The time from the first signal to the end of the run."""
GRACE_SECONDS = 4.0
"""How long what is under way may go on after a signal; then it is given up."""
CLOSE_SECONDS = 2.0
"""What of `LEAVE_SECONDS` is kept to end threads and processes."""


def never() -> bool:
    """Return False: a condition for `Interruption.only_if`."""
    return False


def always() -> bool:
    """Return True: a condition for `Interruption.only_if`."""
    return True


class Interrupted(BaseException):
    """Raised to stop a run. The message names the signal or the limit that stopped it."""

    lost_steps = 0
    """Finished steps that are not in a checkpoint: a resumed run takes them again."""

    def in_words(self) -> str:
        """Return what stopped the run and what it costs, without a period."""
        if self.lost_steps == 0:
            return f"stopped by {self}. Nothing is lost"
        steps = f"{self.lost_steps:,} finished step{'s' * (self.lost_steps > 1)}"
        return (
            f"stopped by {self}. The last checkpoint is whole; {steps} after it will be taken "
            "again, with the same numbers"
        )


class Interruption:
    """A context manager that turns SIGINT, SIGTERM and a time limit into `Interrupted`.

    A signal within `only_if` raises at once if the condition given there holds. Any other signal is
    kept, `notice` is called with its name, and the next `check` raises, or, wherever the main
    thread is, the end of `GRACE_SECONDS`. A second signal always raises at once. Outside the main
    thread, which alone is told of signals, nothing is handled.
    """

    def __init__(
        self, minutes: float | None = None, notice: Callable[[str], None] | None = None
    ) -> None:
        """`minutes` is the time limit, counted from now; None for no limit."""
        self.minutes, self.notice, self._began = minutes, notice, time.monotonic()
        self.reason: str | None = None
        """The name of the first signal, once there was one."""
        self._since: float | None = None
        """When it arrived, on the monotonic clock."""
        self._may_raise: Callable[[], bool] = never
        self._old_handlers: dict[int, object] = {}

    def minutes_left(self) -> float | None:
        """Return the minutes until the time limit, at least 0.001; None if there is no limit."""
        if self.minutes is None:
            return None
        # Not 0, which means "not set" to the process that a restart passes it to.
        return max(self.minutes - (time.monotonic() - self._began) / 60, 0.001)

    def seconds_left(self) -> float:
        """Return the seconds in which the run must have saved what it saves; inf before the first
        signal."""
        if self._since is None:
            return math.inf
        return self._since + LEAVE_SECONDS - CLOSE_SECONDS - time.monotonic()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if (minutes := self.minutes_left()) is not None:
                _set_alarm(60.0 * minutes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._old_handlers and (self.minutes is not None or self.reason is not None):
            _set_alarm(0.0)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._old_handlers = {}

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

    @contextmanager
    def last_work(self) -> Iterator[None]:
        """Within this context, after a signal, raise `Interrupted` when `seconds_left` is 0."""
        if self._since is None or not self._old_handlers:
            yield
            return
        _set_alarm(max(self.seconds_left(), 0.001))
        try:
            yield
        finally:
            _set_alarm(0.0)

    def pass_on(self) -> None:
        """Send a signal that was kept, and that the run ended too soon to be stopped by, to what
        handles it without this context: it was meant for the program."""
        names = {"Ctrl-C": "SIGINT", "SIGTERM": "SIGTERM"}
        if self.reason in names:
            signal.raise_signal(getattr(signal, names[self.reason]))

    def check(self) -> None:
        """Raise `Interrupted` if a signal was kept."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, is_second = REASONS[signal.Signals(number).name], self.reason is not None
        if self.reason is None or name != REASONS["SIGALRM"]:  # later, the alarm ends the grace
            self.reason = name
        if self._since is None:
            self._since = time.monotonic()
        if is_second or self._may_raise():
            raise Interrupted(self.reason)
        _set_alarm(GRACE_SECONDS)
        if self.notice is not None:
            self.notice(self.reason)


def _set_alarm(seconds: float) -> None:
    """Have SIGALRM sent after so many seconds; 0 cancels it. Windows has no such timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
