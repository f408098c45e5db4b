"""The command `quartet` in this process: a process of its own spends four seconds on imports."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from quartet.cli import main


class Captured(io.BytesIO):
    """Bytes that stay readable: the command puts a writer of its own over its streams, which closes them when it goes."""

    def close(self) -> None: ...


def quartet_here(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Call `main` as the command does, and return its exit code and what it printed. For requests that are refused or only
    looked up: a run would leave threads and loggers behind."""
    out, err = Captured(), Captured()
    before, sys.argv = sys.argv, ["quartet", *words]
    code: int | str | None = 0
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(io.TextIOWrapper(out, "utf-8", write_through=True)),
            contextlib.redirect_stderr(io.TextIOWrapper(err, "utf-8", write_through=True)),
        ):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    printed, complaints = out.getvalue().decode(), err.getvalue().decode()
    return subprocess.CompletedProcess(["quartet", *words], code or 0, printed, complaints)
