"""Processes that end when the process that started them is gone, whatever killed it.

The parent holds the writing end of a pipe, and each child reads the other end. When the parent
ends, even by SIGKILL, the system closes its end, and the children stop as SIGTERM stops them.
"""

import contextlib
import os
import signal
import stat
import threading
import time

LEASH = "QUARTET_LEASH"
"""The environment variable with the number of the pipe's reading end in a child."""
PATIENCE = 20.0
"""Seconds that a child has to end after SIGTERM; then it kills itself."""


class Leash:
    """The parent's side: a pipe that is open as long as this process runs."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that a child needs, beside `reading` among its open files."""
        return {LEASH: str(self.reading)}

    def close(self) -> None:
        """Close the pipe: children that are left stop."""
        for handle in (self.reading, self._writing):
            with contextlib.suppress(OSError):
                os.close(handle)


def end_with_parent() -> None:
    """If this process was started on a leash, stop when its parent has ended."""
    number = os.environ.get(LEASH, "")
    if not number.isdecimal():
        return
    try:
        if not stat.S_ISFIFO(os.fstat(int(number)).st_mode):
            return
    except OSError:  # a grandchild, which inherits the variable and not the pipe
        return
    threading.Thread(target=_wait, args=[int(number)], daemon=True).start()


def _wait(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.read(handle, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
