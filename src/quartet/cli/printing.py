"""Standard output for consoles that know few characters, and for pipes that may be closed."""

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any

SIGNS = {
    "█": "#",
    "░": ".",
    "→": "->",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": "-",
    "…": "...",
    "▲": "!",
    "±": "+-",
    "≈": "~",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "⟦": "[[",
    "⟧": "]]",
    "“": '"',
    "”": '"',
    "’": "'",
    "∞": "inf",
}
"""The replacement of each sign that a console cannot encode. Other characters are printed as their
escape in Python, such as `\\u20ac`."""
ERRORS = "quartet.signs"
NO_READER = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET}
"""The error numbers of a stream that has no reader any more."""


def _replace_signs(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of characters that cannot be encoded, and where to go on: the
    interface of an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    replaced = [SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters]
    return "".join(replaced), error.end


codecs.register_error(ERRORS, _replace_signs)


class SafeStream(io.TextIOWrapper):
    """Standard output or error that can print any character.

    With `outlives_reader`, a closed pipe or a full disk does not raise: the text is dropped.
    """

    outlives_reader = False
    replaced: Any = None
    """The stream that this one replaces. A reference is kept because that stream would close the
    file of both when it is garbage-collected."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except (OSError, ValueError) as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Raise the error of a failed write, unless the stream outlives its reader."""
        if not self.outlives_reader or isinstance(error, UnicodeError):
            raise error
        if isinstance(error, OSError) and error.errno in NO_READER:
            discard_output(self)


def print_anything() -> None:
    """Replace standard output and error by streams that can print any character."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, SafeStream):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            safe = SafeStream(
                stream.buffer,
                encoding=stream.encoding,
                errors=ERRORS,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            safe.replaced = stream
            setattr(sys, name, safe)


def outlive_readers() -> None:
    """Drop what is printed to a closed pipe from here on, instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, SafeStream):
            stream.outlives_reader = True


def discard_output(stream: Any) -> None:
    """Send what is printed from here on, and what is still buffered, to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, stream.fileno())
        os.close(null_device)
