"""The log of a run: what libraries log and warn about goes to `run.log`, not over the live
lines."""

import logging
import warnings
from pathlib import Path


def log_to(path: Path) -> None:
    """Send all logging and warnings of this process to a file. For a process that is ours: handlers
    that were set up before are replaced."""
    import transformers

    logging.raiseExceptions = False  # a full disk is said once, by the run, not by each log line
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    logging.basicConfig(
        handlers=[handler],
        level=logging.INFO,
        format="%(asctime)s %(name)s %(message)s",
        force=True,
    )
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()


def log_traceback() -> None:
    """Log the exception that is being handled, with its traceback."""
    logging.exception("the run failed")
