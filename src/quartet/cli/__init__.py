"""The command `quartet`: parse, call, print. Heavy imports happen inside the verbs that need
them."""

import atexit
import contextlib
import os
import sys
from pathlib import Path

from quartet.cli import (  # noqa: F401
    check,
    critic,
    evaluate,
    explain,
    export,
    foreign,
    inspect,
    label,
    run,
    sweep,
)
from quartet.cli.common import (
    FAILED,
    INTERRUPTED,
    RESUMABLE,
    WRONG_REQUEST,
    app,
    complaints,
)
from quartet.cli.printing import discard_output, print_anything
from quartet.errors import QuartetError
from quartet.io.heap import share_one_heap
from quartet.io.leash import end_with_parent

NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
"""The environment variable by which transformers and huggingface_hub show no progress bars, which
would break up the printed lines. They read it when they are imported."""


def main() -> None:
    """Run the command. An error prints one sentence; with `--debug` it prints a traceback."""
    end_with_parent()
    share_one_heap()
    print_anything()
    os.environ.setdefault(NO_BARS, "1")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        _check_working_folder()
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is handled
    except SystemExit as end:
        _end_at_once(end)
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the pipe has gone
        for stream in (sys.stdout, sys.stderr):
            discard_output(stream)
        sys.exit(FAILED)
    except QuartetError as error:
        if debug:
            raise
        complaints.print(str(error), style="red", soft_wrap=True)
        sys.exit(WRONG_REQUEST)
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())[:500]
        complaints.print(
            f"failed: {type(error).__name__}: {message}. --debug prints the traceback.",
            style="red",
            soft_wrap=True,
        )
        sys.exit(FAILED)


def _check_working_folder() -> None:
    """Raise QuartetError if there is none: torch's libraries would end the process without a
    word."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise QuartetError(
            "The folder that this command was started in was deleted. Change to another one."
        ) from None


def _end_at_once(end: SystemExit) -> None:
    """End the process without the interpreter's own end after a run that was stopped, and where a
    thread is still in native code.

    The interpreter's end releases every object of the models and the tokenizer, which takes seconds
    of the time in which a stopped run must be gone, and would abort in torch's code where a thread
    is there. The run folder is complete by then.
    """
    threads = sys.modules.get("quartet.io.threads")
    if end.code != RESUMABLE and not (threads and threads.left_behind()):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(end.code if isinstance(end.code, int) else FAILED)
