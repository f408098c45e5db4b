"""The base class of the package's exceptions, and those that several layers raise."""

from collections.abc import Sequence


class QuartetError(Exception):
    """Base class of all exceptions that this package raises on purpose.

    The message is one sentence or more for a reader: what is wrong, where, and what to do about it.
    Most subclasses also have a base among Python's own (ValueError, RuntimeError, OSError).
    """


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
