"""What a part is: a frozen dataclass whose fields are its settings, checked when it is made."""

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def part(cls: type[T]) -> type[T]:
    """Make `cls` a part: frozen, unknown fields refused, ranges and types checked at construction.

    `Field(default, ge=..., description=...)` states a range and why it holds; the description becomes the second
    sentence of the error that a person reads.
    """
    decorate: Callable[..., Any] = checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    return decorate(cls)


__all__ = ["Field", "part"]
