"""The process in which a person's reward function runs: `python -m quartet.rewards.worker`.

A line of JSON in, a line of JSON out; nothing of Quartet is imported, and nothing is unpickled. What the function prints goes
to standard error, so that it cannot be taken for an answer.
"""

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

Function = Callable[..., Any]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to hear
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    function: Function | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if function is None:
                function = load(request["function"])
                _answer(answers, {"parameters": parameters(function)})
            else:
                _answer(answers, {"values": plain(call(function, request["arguments"]))})
        except BaseException as error:  # a person's code may raise anything, SystemExit too
            traceback.print_exc()
            _answer(answers, {"error": described(error)})


def load(reference: str) -> Function:
    """The function of `file.py:name`, `package.module:name` or `package.module.name`."""
    place, _, name = reference.rpartition(":") if ":" in reference else reference.rpartition(".")
    if place.endswith(".py"):
        path = Path(place).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise AttributeError(f"{place} has no {name}")
    function: Function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function


def parameters(function: Function) -> dict[str, Any]:
    """Which arguments a function can be given, and which of them it must be."""
    takes = inspect.signature(function).parameters.values()
    named = [p for p in takes if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    return {
        "names": [p.name for p in named],
        "required": [p.name for p in named if p.default is p.empty],
        "any": any(p.kind is p.VAR_KEYWORD for p in takes),
    }


def call(function: Function, arguments: dict[str, Any]) -> Any:
    made = function(**arguments)
    if inspect.isawaitable(made):

        async def awaited() -> Any:
            return await made

        return asyncio.run(awaited())
    return made


def plain(values: Any) -> list[Any]:
    """What a function returned, as lists of numbers and None: arrays and tensors are such lists too."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict | set | frozenset):
        raise TypeError(f"returned {_kind(values)}, not a list with a number for each response")
    return [_number(i, value) for i, value in enumerate(values)]


def _number(index: int, value: Any, nested: bool = False) -> Any:
    if value is None and not nested:
        return None
    if isinstance(value, str | bytes | dict):
        raise TypeError(f"returned {_kind(value)} for response {index}, not a number, None or a list of numbers")
    if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0:
        if nested:
            raise TypeError(f"returned lists in lists for response {index}")
        return [_number(index, item, nested=True) for item in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"returned {_kind(value)} for response {index}, not a number, None or a list of numbers") from None


def _kind(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"


def described(error: BaseException) -> str:
    """The error and the last line of the person's own code that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _answer(file: TextIO, answer: dict[str, Any]) -> None:
    file.write(json.dumps(answer) + "\n")
    file.flush()


def _die_with_parent() -> None:
    """On Linux, end with the run (PR_SET_PDEATHSIG), and adopt orphans (PR_SET_CHILD_SUBREAPER): what a function starts and
    leaves stays below this process, where the run finds it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)
        libc.prctl(36, 1)


if __name__ == "__main__":
    main()
