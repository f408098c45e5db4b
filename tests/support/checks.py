"""Run-time checks of annotations that cost a long test no more than a short one."""

import functools
from collections import Counter
from types import FunctionType
from typing import Any

import jaxtyping
import jaxtyping._decorator

CALLS = 100
"""Calls of one function whose arguments and result are checked in each test. A loop of 500 steps calls the same functions with
the same shapes again and again, and checking takes half of its time."""

_CHECKED: Counter[str] = Counter()
_jaxtyped = jaxtyping.jaxtyped


def start_test() -> None:
    """Count calls from 0."""
    _CHECKED.clear()


def install() -> None:
    """Let jaxtyping's import hook, which decorates each function with `jaxtyping.jaxtyped`, use `checked_at_first`. It also
    decorates inner functions, each time that they are defined, and that alone takes a millisecond."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = checked_at_first


def checked_at_first(function: Any = None, *, typechecker: Any) -> Any:
    """Return a function of which the first CALLS calls in a test are checked; a class, property or method of a class as
    jaxtyping returns it, which comes back here with the functions in it."""
    if function is None:
        return functools.partial(checked_at_first, typechecker=typechecker)
    if not isinstance(function, FunctionType):
        return _jaxtyped(function, typechecker=typechecker)
    name = f"{function.__module__}.{function.__qualname__}"
    checked = None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if _CHECKED[name] >= CALLS:
            return function(*args, **kwargs)
        _CHECKED[name] += 1
        if checked is None:
            checked = _jaxtyped(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return called
