"""The log of a run: what libraries log and warn about goes to `run.log`, not over the live
lines."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
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


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Show no progress bars of transformers for as long as the context lasts."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send what Quartet logs to a file as well, for as long as the context lasts, and show no
    progress bars of transformers. For a process that belongs to the caller: other handlers stay,
    and everything is as before in the end."""
    logger = logging.getLogger("quartet")
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with no_progress_bars():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def log_traceback() -> None:
    """Log the exception that is being handled, with its traceback."""
    logging.exception("the run failed")
