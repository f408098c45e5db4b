"""What a part is: a frozen dataclass whose fields are its settings, checked when it is made."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AllowInfNan, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

T = TypeVar("T")
OrInf = Annotated[float, AllowInfNan(True)]
"""A bound that may be infinite: none."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def part(cls: type[T]) -> type[T]:
    """Make `cls` a part: frozen, unknown fields refused, ranges and types checked at construction.

    `Field(default, ge=..., description=...)` states a range and why it holds; the description becomes the second
    sentence of the error that a person reads.
    """
    decorate: Callable[..., Any] = checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    return decorate(cls)


__all__ = ["Field", "OrInf", "part"]
