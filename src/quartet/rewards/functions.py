"""Rewards that are functions: Quartet's own in this process, a user's in processes of their
own."""

import ast
import contextlib
import io
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quartet.experience import Rollout
from quartet.io.texts import excerpt
from quartet.io.threads import WAKE_SECONDS, map_concurrently
from quartet.rewards.protocol import Logged, RewardError, Score, openrlhf_labels

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Seconds that the import of a user's module may take."""
MAX_ANSWER_BYTES = 1_000_000_000
"""How long an answer may be: numbers for some 50 million tokens."""
MAX_LINE_BYTES = 65_536
"""How much of what a function prints is one line of the log."""
HELPERS = {"log_extra": None, "log_metric": None}
"""Functions that TRL gives to reward functions; `worker.call` puts them in."""
GRACE_SECONDS = 2.0
"""Seconds to wait for a process to end."""


class TextReward:
    """A function of the prompt's and the response's text, such as a world's gold reward."""

    def __init__(self, name: str, function: Callable[[str, str], float]) -> None:
        self.name, self.function = name, function

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return what the function says of each response, one after another."""
        return [self.function(r.prompt.text, r.response) for r in rollouts]


@dataclass(frozen=True)
class FunctionResult:
    """What a function says of one response."""

    value: Any
    """A number, None, or a list with a number per token."""
    logged: Logged
    """What it logged in the call that this response was part of."""


class FunctionReward:
    """A user's function, by `file.py:name` or dotted path. docs/rewards.md says what it is given
    and may return.

    It runs in `processes` processes, each with a share of the responses, never more than `timeout`
    seconds; what it does to its process, it does not do to the run. A function that gives a number
    per token has their sum for a score.
    """

    def __init__(
        self,
        name: str,
        function: str,
        token_texts: Callable[[Sequence[int]], list[str]] | None,
        timeout: float = 60.0,
        processes: int = 1,
    ) -> None:
        check_reference(function)
        self.name = name
        self.function = function
        self.token_texts = token_texts
        self.timeout = timeout
        self.workers: list[FunctionProcess] = [FunctionWorker(function) for _ in range(processes)]
        self._last: tuple[list[Rollout], list[FunctionResult]] = ([], [])

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        values = [answer.value for answer in self._answers(rollouts)]
        return [sum(value) if isinstance(value, list) else value for value in values]

    def logged(self, rollouts: Sequence[Rollout]) -> list[Logged]:
        return [answer.logged for answer in self._answers(rollouts)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        values = [answer.value for answer in self._answers(rollouts)]
        for rollout, value in zip(rollouts, values, strict=True):
            if value is not None and not isinstance(value, list):
                raise RewardError(
                    f"{self.function} returned one number for {rollout.id}, and the algorithm "
                    f"reads one per token: return a "
                    'list of them, or use algorithm.rewards.type = "last_token".'
                )
        return [[] if value is None else value for value in values]

    def _answers(self, rollouts: Sequence[Rollout]) -> list[FunctionResult]:
        """Return what the function says; it is called once for the same rollouts."""
        if len(rollouts) == len(self._last[0]) and all(
            a is b for a, b in zip(rollouts, self._last[0], strict=True)
        ):
            return self._last[1]
        size = -(-len(rollouts) // len(self.workers))
        shares = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        for worker in self.workers:
            # In this thread: a process dies with the thread that started it, and the pool's end.
            worker.start()
        try:
            found = map_concurrently(
                lambda pair: self._ask(*pair),
                list(zip(self.workers, shares, strict=False)),
                len(shares),
            )
        except (
            BaseException
        ):  # a failure or an interruption: nothing that was asked goes on by itself
            for worker in self.workers:
                worker.stop()
            raise
        answers = [answer for share in found for answer in share]
        self._last = (list(rollouts), answers)
        return answers

    def _ask(self, worker: "FunctionProcess", rollouts: Sequence[Rollout]) -> list[FunctionResult]:
        answer = worker.call(
            self._arguments(rollouts, worker.parameters), self.timeout, len(rollouts)
        )
        values, metrics, columns = answer["values"], answer["metrics"], answer["columns"]
        if len(values) != len(rollouts):
            raise RewardError(
                f"{self.function} returned {len(values)} value{'s' * (len(values) != 1)} for "
                f"{len(rollouts)} responses. "
                f"Return a list of {len(rollouts)} numbers."
            )
        for rollout, value in zip(rollouts, values, strict=True):
            if isinstance(value, list) and len(value) != len(rollout.response_ids):
                raise RewardError(
                    f"{self.function} returned a list of {len(value)} for {rollout.id}, which has "
                    f"{len(rollout.response_ids)} tokens. Return one number for each response, or "
                    "one for each of its `tokens`."
                )
        return [
            FunctionResult(
                value, Logged(metrics, {name: column[i] for name, column in columns.items()})
            )
            for i, value in enumerate(values)
        ]

    def _arguments(self, rollouts: Sequence[Rollout], takes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the function: those that it takes, of all there are."""
        offered = {
            name: [r.prompt.extra.get(name) for r in rollouts]
            for r in rollouts
            for name in r.prompt.extra
        }
        offered |= {
            "prompts": [r.prompt.text for r in rollouts],
            "responses": [r.response for r in rollouts],
            "completions": [_as_trl(r) for r in rollouts],
            "messages": [r.prompt.messages for r in rollouts],
            "ended": [r.finish_reason == "stop" for r in rollouts],
            "prompt_ids": [list(r.prompt.ids) for r in rollouts],
            "completion_ids": [list(r.response_ids) for r in rollouts],
        }
        offered = _of_other_libraries(rollouts, takes["names"]) | offered
        if self.token_texts is not None and (takes["any"] or "tokens" in takes["names"]):
            offered["tokens"] = [self.token_texts(r.response_ids) for r in rollouts]
        if missing := [name for name in takes["required"] if name not in offered]:
            plurals = [f"{name}s" for name in missing if f"{name}s" in offered]
            meant = f" Did you mean {', '.join(plurals)}? Each is a list." if plurals else ""
            raise RewardError(
                f"{self.function} asks for {', '.join(missing)}, which the data do not have."
                f"{meant} There are {', '.join(offered)}."
            )
        return {
            name: column
            for name, column in offered.items()
            if takes["any"] or name in takes["names"]
        }


@runtime_checkable
class FunctionProcess(Protocol):
    """What calls a function: a process of its own, or this one (`objects.InProcess`)."""

    parameters: dict[str, Any]
    """Which arguments the function takes, see `worker.parameters`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def call(self, arguments: Mapping[str, Any], timeout: float, count: int) -> dict[str, Any]:
        """Return what `worker.call` returns."""
        ...


class FunctionWorker:
    """A process with one function in it. It is started again after it was stopped or died."""

    def __init__(self, function: str) -> None:
        """Raises `RewardError` on Windows, where the processes of a function that hangs cannot be
        ended together."""
        self.function = function
        self.process: subprocess.Popen[bytes] | None = None
        if not hasattr(os, "killpg"):
            raise RewardError(
                f"{function}: reward functions in files run in a process that needs Linux or "
                "macOS. Pass the function to quartet.train instead, or use WSL."
            )
        self.starter = threading.current_thread()
        """The thread that started the process, which ends with it."""
        self.parameters: dict[str, Any] = {}
        self.number = 0
        self.start()

    def start(self) -> None:
        """Start the process, unless it is running."""
        if self.process is not None and not self.starter.is_alive():
            self.stop()
        if self.process is not None:
            return
        self.starter = threading.current_thread()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quartet.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        threading.Thread(
            target=_log_lines, args=(self.process.stderr, self.function), daemon=True
        ).start()
        answer = self._exchange({"function": self.function}, START_SECONDS)
        if answer is None:
            raise RewardError(f"{self.function} could not be imported within {START_SECONDS:g} s.")
        if "error" in answer:
            self.stop()
            raise RewardError(f"{self.function} cannot be used: {answer['error']}.")
        self.parameters = answer["parameters"]

    def call(self, arguments: Mapping[str, Any], timeout: float, count: int) -> dict[str, Any]:
        answer = self._exchange({"arguments": arguments, "count": count}, timeout)
        if answer is None:
            raise RewardError(
                f"{self.function} took longer than {timeout:g} s for {count} responses. Raise "
                f"reward.timeout, give it more "
                "reward.processes, or let it return None for what it cannot judge in time."
            )
        if "error" in answer:
            raise RewardError(f"{self.function} {answer['error']}.")
        return answer

    def _exchange(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        """Return the answer; None where there was none in time, and then the process is ended. No
        wait here is without a deadline, whatever the function does to its process, its descriptors
        and its children."""
        process = self.process
        assert process is not None
        self.number += 1
        number, deadline = self.number, time.monotonic() + timeout
        written = json.dumps({**request, "number": number}, default=str) + "\n"
        try:
            line = _converse(process, written.encode(), deadline)
        except TimeoutError:
            self._stop(process)
            return None
        if line is None:
            code = exit_code(process, GRACE_SECONDS)
            self._stop(process)
            how = (
                "closed its output and went on, and was ended"
                if code is None
                else f"ended by itself (exit code {code})"
            )
            raise RewardError(f"{self.function}: its process {how}. What it said is in run.log.")
        try:
            answer: dict[str, Any] = json.loads(line)
            if answer["number"] == number:
                return answer
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        self._stop(process)
        raise RewardError(
            f"{self.function}: its process wrote something that is no answer: {excerpt(line)}. A "
            "function may print, and return; other descriptors than its own are not for it."
        )

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        """End this process, unless another has taken its place."""
        if self.process is process:
            self.stop()

    def stop(self) -> None:
        """End the process and all that it has started."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.returncode is None:
            end_tree(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __del__(self) -> None:
        self.stop()


def _converse(process: "subprocess.Popen[bytes]", request: bytes, deadline: float) -> bytes | None:
    """Write a request and return the line that answers it; None where the output was closed
    instead. Raises `TimeoutError` at the deadline."""
    assert process.stdin is not None and process.stdout is not None
    remaining, answer = memoryview(request), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            left = max(deadline - time.monotonic(), 0)
            ready = selector.select(min(left, WAKE_SECONDS))
            if not ready and left <= WAKE_SECONDS:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    try:
                        remaining = remaining[os.write(process.stdin.fileno(), remaining[:65536]) :]
                    except BlockingIOError:
                        continue
                    except OSError:  # the process has closed it; its output tells why
                        remaining = remaining[:0]
                    if not remaining:
                        selector.unregister(process.stdin)
                else:
                    piece = os.read(process.stdout.fileno(), 1 << 20)
                    answer += piece
                    if not piece:
                        return None
                    if answer.endswith(b"\n") or len(answer) > MAX_ANSWER_BYTES:
                        return bytes(answer)


def exit_code(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Return how a process has ended, without collecting it: its group keeps its number for as
    long. None where it has not ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # another thread has collected it
            return process.returncode
        if status is not None:
            return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        time.sleep(0.005)
    return None


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, its process group and, where /proc tells of them, all that descends from it.
    The process adopts its orphans (see `worker.py`), so a child that left the group is found, too,
    unless the process has ended before."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # it starts nothing more
    for _ in range(20):
        living = descendants(process.pid)
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not living:
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        log.warning("process %d was killed and has not ended", process.pid)


def descendants(root: int) -> list[int]:
    """Return the living processes that descend from one; none where there is no /proc."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    found: list[int] = []
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - set(found)
        found += frontier
    return found


def _of_other_libraries(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that only functions for TRL or OpenRLHF ask for by name."""
    arguments: dict[str, Any] = {name: value for name, value in HELPERS.items() if name in names}
    if "trainer_state" in names:
        arguments["trainer_state"] = {"global_step": min(r.policy_version for r in rollouts)}
    if "queries" in names:
        arguments["queries"] = [r.prompt.text + r.response for r in rollouts]
    if "labels" in names:
        arguments["labels"] = openrlhf_labels(rollouts)
    return arguments


def _as_trl(rollout: Rollout) -> str | list[dict[str, str]]:
    """Return a completion in the form of TRL's reward functions: text, or a list with the
    assistant's message in a conversation."""
    if rollout.prompt.messages is None:
        return rollout.response
    return [{"role": "assistant", "content": rollout.response}]


def check_reference(function: str, key: str = "reward.function") -> None:
    """Raise `RewardError` where the file is not there or does not define the name. The file is
    parsed and not run."""
    place, colon, name = function.rpartition(":")
    if not colon and "." in function and not function.endswith(".py"):
        return  # a dotted path
    if not colon or not place or not name.isidentifier():
        raise RewardError(f'{key} = "{function}": write file.py:name, or package.module.name.')
    if not place.endswith(".py"):
        return
    path = Path(place)
    if not path.is_file():
        raise RewardError(f'{key} = "{function}": {place}: no such file.')
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise RewardError(f'{key} = "{function}": {place} is not Python: {error}.') from None
    defined = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assigned = [
        n.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for n in node.targets
        if isinstance(n, ast.Name)
    ]
    imported = [
        a.asname or a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for a in node.names
    ]
    if name not in {*defined, *assigned, *imported}:
        there = f" It defines {', '.join(defined)}." if defined else ""
        raise RewardError(f'{key} = "{function}": {place} has no {name}.{there}')


def _log_lines(file: Any, function: str) -> None:
    """Write what a function prints to the run's log."""
    with io.BufferedReader(file) as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            log.info("%s: %s", function, line.decode("utf-8", errors="replace").rstrip())
