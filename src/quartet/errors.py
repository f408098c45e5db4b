"""The base class of the package's exceptions, and those that several layers raise."""

import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

_LIBRARIES = (str(Path(__file__).parent), sysconfig.get_path("stdlib"))
_INSTALLED = ("site-packages", "dist-packages", "<frozen")
"""Where the files are, and a part of the path of those, that are not the reader's own."""


class QuartetError(Exception):
    """Base class of all exceptions that this package raises on purpose.

    The message is one sentence or more for a reader: what is wrong, where, and what to do about it.
    Most subclasses also have a base among Python's own (ValueError, RuntimeError, OSError).
    """

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and Jupyter show in the place of the whole traceback: the lines of
        the reader's own code that led here, and the message; and before them those of an exception
        in the reader's code that caused this one. `traceback.print_exception(sys.last_value)`
        prints the whole, and `%debug` has its frames."""
        chain: list[BaseException] = [self]
        while (cause := chain[0].__cause__) is not None:
            chain.insert(0, cause)
        lines = []
        for error in chain:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if _is_own(frame.filename)]
            if own or error is self:
                lines += traceback.format_list(own) + traceback.format_exception_only(error)
        return "".join(lines).splitlines()


def _is_own(file: str) -> bool:
    """Return whether a file is the reader's own, or a cell of a notebook."""
    return not file.startswith(_LIBRARIES) and not any(part in file for part in _INSTALLED)


def error_in_words(error: Exception) -> str:
    """Return what an exception says. An unexpected one is followed by the last line of the reader's
    own code that it came from, if there is one."""
    if isinstance(error, QuartetError):
        return str(error)
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, NotImplementedError) and not str(error):
        method = frames[-1][0]  # the base class's, which the reader's class does not have
        return f"{type(method.f_locals.get('self')).__name__} has no {method.f_code.co_name}."
    own = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in frames
        if _is_own(frame.f_code.co_filename)
    ]
    kind = type(error).__name__
    if not str(error):
        return f"{kind} ({own[-1]})" if own else kind
    return f"{error} ({kind}, {own[-1]})" if own else str(error)


class PartError(QuartetError, TypeError):
    """A part of an algorithm that returned what it must not: the part, and what is expected."""


SAME_MODEL = "put back the model that the stage began with, and the settings that were accepted"


class StateMisfit(QuartetError, ValueError):
    """A saved state that fits other models, settings or files than those of this run.

    The state is whole, and earlier states of the same run do not fit either. `remedy` says, without
    a full stop, what to change so that it fits.
    """

    def __init__(self, what: str, remedy: str = SAME_MODEL) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what, self.remedy = what, remedy


class NonFinite(QuartetError, RuntimeError):
    """A number that is not finite, found before it could change a weight.

    `what` names the number. `sample` and `tokens` name the sample that it belongs to and the
    sample's tokens; they are empty where the number belongs to no single sample.
    """

    def __init__(self, what: str, sample: str | None = None, tokens: Sequence[int] = ()) -> None:
        where = f" in sample {sample}" if sample else ""
        super().__init__(f"{what} is not finite{where}; no weight was changed by it")
        self.what, self.sample, self.tokens = what, sample, list(tokens)
