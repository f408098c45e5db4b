"""The process in which a user's reward function runs: `python -m quartet.rewards.worker`.

A line of JSON in, a line of JSON out; nothing of Quartet is imported, and nothing is unpickled.
What the function prints goes to standard error, so that it cannot be taken for an answer.
"""

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger("quartet.rewards")
Function = Callable[..., Any]
NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, Set)
PACKAGE = str(Path(__file__).parents[1])
LONGEST_MESSAGE = 2000
"""Characters of an error that a run shows."""
LONGEST_NAME = 100
"""Characters of the name of a logged metric or column."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to hear
    _die_with_parent()
    requests, answers = _own_pipes()
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(logging.INFO)
    own, function = os.getpid(), None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if function is None:
                function = load(request["function"])
                answer = {"parameters": parameters(function)}
            else:
                answer = call(function, request["arguments"], request["count"])
        except BaseException as error:  # a user's code may raise anything, SystemExit too
            traceback.print_exc()
            answer = {"error": described(error) if function is None else failure(error)}
        if os.getpid() != own:
            os._exit(0)  # the function has forked, and its child has come back from it, too
        answers.write(json.dumps(answer | {"number": request["number"]}) + "\n")
        answers.flush()


def _own_pipes() -> tuple[TextIO, TextIO]:
    """Return where requests come from and where answers go. The function and the programs that it
    starts have other ones: standard input is empty, and standard output is standard error."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, answers


def load(reference: str) -> Function:
    """Return the function of `file.py:name`, `package.module:name` or `package.module.name`."""
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
        raise TypeError(f"{name} is {_kind(function)}, not a function")
    return function


def parameters(function: Function) -> dict[str, Any]:
    """Return the arguments that a function takes, and those that it requires."""
    takes = inspect.signature(function).parameters.values()
    named = [p for p in takes if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    return {
        "names": [p.name for p in named],
        "required": [p.name for p in named if p.default is p.empty],
        "any": any(p.kind is p.VAR_KEYWORD for p in takes),
    }


class NotScores(TypeError):
    """A function returned something else than scores. The message begins with "returned"."""


class TrainerState:
    """TRL's `trainer_state`, of which Quartet knows the step."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.global_step: int = facts["global_step"]
        """Optimizer updates of the policy before it sampled these responses."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has global_step here, and no {name}")


class Logs:
    """What a function gives to TRL's `log_metric` and `log_extra` in one call."""

    def __init__(self, count: int) -> None:
        self.count = count
        """The number of responses."""
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """Keep a number. Raises `TypeError` or `ValueError` for anything else."""
        _check_name("log_metric", name)
        try:
            number = float(value) if not isinstance(value, NO_LISTS) else math.nan
        except Exception:
            number = math.nan
        if not math.isfinite(number):
            shown = value if isinstance(value, float) else _kind(value)
            raise ValueError(f"log_metric({name!r}, …) was given {shown}, not a finite number")
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Any) -> None:
        """Keep one value per response: numbers, texts, None; anything else as its text. Raises
        `TypeError` or `ValueError` for anything but a list of as many values."""
        _check_name("log_extra", column)
        if not _is_list(values):
            raise TypeError(f"log_extra({column!r}, …) was given {_kind(values)}, not a list")
        kept = [_cell(value) for value in values]
        if len(kept) != self.count:
            raise ValueError(
                f"log_extra({column!r}, …) was given {len(kept)} values for {self.count} responses"
            )
        self.columns[column] = kept

    def means(self) -> dict[str, float]:
        """Return the mean of each metric's numbers."""
        return {name: math.fsum(each) / len(each) for name, each in self.metrics.items()}


def _check_name(function: str, name: Any) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
        raise TypeError(
            f"{function} was given {_kind(name)} for a name; "
            f"give it a text of 1 to {LONGEST_NAME} printable characters"
        )


def _cell(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    is_json = value is None or isinstance(value, str | int)
    return value if is_json or (isinstance(value, float) and math.isfinite(value)) else str(value)


def call(function: Function, arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """Return what a function returns for `count` responses, as `plain` has it, and what it logs
    meanwhile: `values`, `metrics` and `columns`."""
    logs = Logs(count)
    helpers: Mapping[str, Callable[[Any], Any]] = {
        "trainer_state": TrainerState,
        "log_metric": lambda _: logs.log_metric,
        "log_extra": lambda _: logs.log_extra,
    }  # what TRL gives to reward functions beside columns, from what a run sends of it
    for name, helper in helpers.items():
        if name in arguments and not isinstance(arguments[name], list):  # a list is a column
            arguments = arguments | {name: helper(arguments[name])}
    made = function(**arguments)
    if inspect.isawaitable(made):

        async def awaited() -> Any:
            return await made

        made = asyncio.run(awaited())
    return {"values": plain(made), "metrics": logs.means(), "columns": logs.columns}


def plain(values: Any) -> list[Any]:
    """Return what a function returned as a list of numbers, None and lists of numbers. Arrays and
    tensors are such lists; True and False are 1 and 0; an integer that no float can hold is
    infinite. Of a dict, as OpenRLHF's functions return it, `rewards` is read. Nothing else is
    converted."""
    if isinstance(values, Mapping) and "rewards" in values:
        values = values["rewards"]
    if not _is_list(values):
        raise NotScores(f"returned {_kind(values)}, not a list with a number for each response")
    return [_number(i, value) for i, value in enumerate(values)]


def _number(index: int, value: Any, nested: bool = False) -> Any:
    if value is None and not nested:
        return None
    if _is_list(value):
        if nested:
            raise NotScores(f"returned lists in lists for response {index}")
        return [_number(index, item, nested=True) for item in value]
    try:
        item = (
            value.item() if hasattr(value, "item") else value
        )  # of an array: float() takes text and complex numbers there
        if isinstance(item, (*NO_LISTS, complex)):
            raise TypeError("no number")
        return float(item)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:
        raise NotScores(
            f"returned {_kind(value)} for response {index}, not a number, None or a list of numbers"
        ) from None


def _is_list(value: Any) -> bool:
    """Return whether a value is a sequence other than text and bytes."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, NO_LISTS)
        and getattr(value, "ndim", 1) != 0
    )


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return repr(value[:100])
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def failure(error: BaseException) -> str:
    """Return what a function did that raised the error, or that returned no scores."""
    return str(error) if isinstance(error, NotScores) else f"failed: {described(error)}"


def described(error: BaseException) -> str:
    """Return the error, with the last line of the user's own code that it came from."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(PACKAGE) and "importlib" not in f.filename
    ]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be read"
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"
    return f"{type(error).__name__}: {text}{where}"


def _die_with_parent() -> None:
    """On Linux, end with the run (PR_SET_PDEATHSIG), and adopt orphans (PR_SET_CHILD_SUBREAPER):
    what a function starts and leaves stays below this process, where the run finds it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)
        libc.prctl(36, 1)


if __name__ == "__main__":
    main()
