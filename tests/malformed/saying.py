"""What holds for every sentence that a person gets."""

from collections.abc import Callable
from typing import Any

import pytest

LONGEST = 600
"""Characters of one refusal."""


def refusal(kinds: Any, act: Callable[[], Any]) -> str:
    """What is said when `act` is refused with one of `kinds`."""
    with pytest.raises(kinds) as error:
        act()
    return readable(str(error.value))


def readable(said: str, lines: int = 1) -> str:
    """The same, where it is short and on one line, or on as many as there are findings."""
    assert said.strip() == said and said
    assert len(said) < LONGEST, f"{len(said)} characters"
    assert said.count("\n") < lines, said
    for noise in ("Traceback", "validation error", "errno", "pydantic"):
        assert noise not in said, said
    return said
