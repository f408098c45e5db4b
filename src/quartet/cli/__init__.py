"""The command `quartet`: parse, call, print. Heavy imports happen inside the verbs that need them."""

import os
import sys

from quartet.cli import running, seeing, trying, using  # noqa: F401
from quartet.cli.common import FAILED, INTERRUPTED, app, complaints


def main() -> None:
    """Whatever goes wrong ends in a sentence; with `--debug` in a traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read what is printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split())[:500]
        complaints.print(f"failed: {type(error).__name__}: {said}. With --debug it says where.", style="red", soft_wrap=True)
        sys.exit(FAILED)
