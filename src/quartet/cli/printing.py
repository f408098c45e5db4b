"""The border between what is printed and where it goes: consoles that know few characters, pipes
that nobody reads any more."""

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
"""What stands for a sign where a console does not have it. Anything else becomes its escape, as in
Python."""
ERRORS = "quartet.signs"
NOBODY = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET}
"""What a stream says that will never be read again."""


def _signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(
        SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost
    ), error.end


codecs.register_error(ERRORS, _signs)


class Printed(io.TextIOWrapper):
    """Standard output or error. It prints whatever it is given. With `outlives_reader` it goes on
    where nobody reads it any more, or its disk is full, and prints nothing then."""

    outlives_reader = False
    replaced: Any = None
    """The stream in whose place it stands, which would close the file that both write to when it is
    forgotten."""

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
        if not self.outlives_reader or isinstance(error, UnicodeError):
            raise error
        if isinstance(error, OSError) and error.errno in NOBODY:
            to_nowhere(self)


def print_anything() -> None:
    """Let standard output and error take every character from here on."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Printed):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            made = Printed(
                stream.buffer,
                encoding=stream.encoding,
                errors=ERRORS,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            made.replaced = stream
            setattr(sys, name, made)


def outlive_readers() -> None:
    """From here on printing does not end the process, whoever stops reading."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Printed):
            stream.outlives_reader = True


def to_nowhere(stream: Any) -> None:
    """What is printed from here on, and what waits to be, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
