"""What a claim called, as a few lines of Python that give the same numbers."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rl_conformance.library import OPERATIONS, Library, Pairs

SHOWN = 2
"""Calls that a reproduction prints; claims about expectations make one per outcome."""


@dataclasses.dataclass(frozen=True)
class Call:
    operation: str
    arguments: tuple[Any, ...]


class Recorder:
    """A library whose calls are kept. Keyword arguments are not taken: the order of the signature
    is part of it."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name not in OPERATIONS:
            return function

        @functools.wraps(function)
        def recorded(*arguments: Any) -> Any:
            self.calls.append(Call(name, tuple(copy(each) for each in arguments)))
            return function(*arguments)

        return recorded


def copy(argument: Any) -> Any:
    """Return the argument as it is now: a library may write into it."""
    if isinstance(argument, Tensor):
        return argument.detach().clone().requires_grad_(argument.requires_grad)
    if isinstance(argument, Pairs):
        return Pairs(**{key: copy(value) for key, value in vars(argument).items()})
    if isinstance(argument, list):
        return [copy(each) for each in argument]
    return argument


def literal(argument: Any) -> str:
    """Return the source text of an argument."""
    if isinstance(argument, Tensor):
        numbers = str(argument.detach().tolist())
        return f"torch.tensor({numbers}{', requires_grad=True' if argument.requires_grad else ''})"
    if isinstance(argument, Pairs):
        fields = ", ".join(f"{key}={literal(value)}" for key, value in vars(argument).items())
        return f"Pairs({fields})"
    if isinstance(argument, list):
        return f"[{', '.join(literal(each) for each in argument)}]"
    return repr(argument)


def gradients(name: str, argument: Any) -> list[str]:
    """Return expressions for the tensors of an argument that have a gradient."""
    if isinstance(argument, Tensor):
        return [name] if argument.requires_grad else []
    if isinstance(argument, Pairs):
        return [f"{name}.{key}" for key, each in vars(argument).items() if each.requires_grad]
    return []


def lines_of(call: Call) -> list[str]:
    names = list(inspect.signature(getattr(Library, call.operation)).parameters)[1:]
    named = list(zip(names, call.arguments, strict=True))
    lines = [f"{name} = {literal(value)}" for name, value in named]
    lines += [f"result = library.{call.operation}({', '.join(names)})", "print(result)"]
    with_gradient = [path for name, value in named for path in gradients(name, value)]
    if with_gradient:
        lines += ["result.sum().backward()", *[f"print({path}.grad)" for path in with_gradient]]
    return lines


def reproduction(key: str, calls: Sequence[Call], measured: Tensor, expected: Tensor) -> str:
    """Return Python lines that make the calls again, and what they gave and should have given.
    `key` is what `load` takes."""
    lines = ["import torch", "from torch import inf, nan"]
    lines += ["from rl_conformance import Pairs, load", f'library = load("{key}")']
    for call in calls[:SHOWN]:
        lines += lines_of(call)
    if len(calls) > SHOWN:
        lines.append(
            f"# and {len(calls) - SHOWN} more calls of this kind; the claim is of them all"
        )
    return "\n".join([*lines, f"# measured: {short(measured)}", f"# expected: {short(expected)}"])


def short(numbers: Tensor, most: int = 12) -> str:
    text = ", ".join(f"{x:.6g}" for x in numbers.flatten()[:most].tolist())
    return f"{text}, …" if numbers.numel() > most else text
