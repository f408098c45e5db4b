"""The command `quartet`: parse, call, print. Heavy imports happen inside the verbs that need
them."""

import sys

from quartet.cli import check, export, inspect, run  # noqa: F401
from quartet.cli.common import FAILED, INTERRUPTED, WRONG_REQUEST, app, complaints
from quartet.cli.printing import print_anything, to_nowhere
from quartet.errors import QuartetError


def main() -> None:
    """Whatever goes wrong ends in a sentence; with `--debug` in a traceback."""
    print_anything()
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whatever read what is printed has gone
        for stream in (sys.stdout, sys.stderr):
            to_nowhere(stream)
        sys.exit(FAILED)
    except QuartetError as error:
        if debug:
            raise
        complaints.print(str(error), style="red", soft_wrap=True)
        sys.exit(WRONG_REQUEST)
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split())[:500]
        complaints.print(
            f"failed: {type(error).__name__}: {said}. With --debug it says where.",
            style="red",
            soft_wrap=True,
        )
        sys.exit(FAILED)
