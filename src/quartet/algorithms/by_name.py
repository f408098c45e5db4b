"""Things that are known by a name."""

from typing import NoReturn, TypeVar

from quartet.io.texts import did_you_mean

T = TypeVar("T")


class ByName(dict[str, T]):
    """A dictionary whose `KeyError` says which of its names may be meant."""

    def __missing__(self, name: object) -> NoReturn:
        raise KeyError(f"{name!r}: no such name.{did_you_mean(name, self)}")
