"""Rewards that are functions: of ours, called here; of a person's, called in processes of their own."""

import ast
import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from pathlib import Path
from typing import Any

from quartet.experience import Rollout
from quartet.rewards.protocol import RewardError, Score

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""How long the import of a person's module may take."""


class TextReward:
    """A function of the prompt's and the response's text, such as a world's gold reward."""

    def __init__(self, name: str, function: Callable[[str, str], float]) -> None:
        self.name, self.function = name, function

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self.function(r.prompt.text, r.response) for r in rollouts]


class FunctionReward:
    """A person's function, by `file.py:name` or dotted path. docs/rewards.md says what it is given and may return.

    It runs in `processes` processes, each with a share of the responses, never more than `timeout` seconds; what it does to
    its process, it does not do to the run. A function that gives a number per token has their sum for a score.
    """

    def __init__(
        self,
        name: str,
        function: str,
        token_texts: Callable[[Sequence[int]], list[str]],
        timeout: float = 60.0,
        processes: int = 1,
    ) -> None:
        check_reference(function)
        self.name, self.function, self.token_texts, self.timeout = name, function, token_texts, timeout
        self.workers = [Worker(function) for _ in range(processes)]
        self._last: tuple[list[Rollout], list[Any]] = ([], [])

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [sum(value) if isinstance(value, list) else value for value in self._values(rollouts)]

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        values = self._values(rollouts)
        for rollout, value in zip(rollouts, values, strict=True):
            if value is not None and not isinstance(value, list):
                raise RewardError(
                    f"{self.function} returned one number for {rollout.id}, and the algorithm reads one per token: return a "
                    'list of them, or use algorithm.rewards.type = "last_token".'
                )
        return [[] if value is None else value for value in values]

    def _values(self, rollouts: Sequence[Rollout]) -> list[Any]:
        """What the function returned; asked once for the same rollouts."""
        if len(rollouts) == len(self._last[0]) and all(a is b for a, b in zip(rollouts, self._last[0], strict=True)):
            return self._last[1]
        size = -(-len(rollouts) // len(self.workers))
        shares = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        for worker in self.workers:
            worker.start()  # here: a process dies with the thread that made it, and those of the pool end
        with ThreadPoolExecutor(len(shares)) as pool:
            found = pool.map(self._ask, self.workers, shares)
        values = [value for share in found for value in share]
        self._last = (list(rollouts), values)
        return values

    def _ask(self, worker: "Worker", rollouts: Sequence[Rollout]) -> list[Any]:
        values: list[Any] = worker.call(self._arguments(rollouts, worker.parameters), self.timeout, len(rollouts))
        if len(values) != len(rollouts):
            raise RewardError(
                f"{self.function} returned {len(values)} value{'s' * (len(values) != 1)} for {len(rollouts)} responses. "
                f"Return a list of {len(rollouts)} numbers."
            )
        for rollout, value in zip(rollouts, values, strict=True):
            if isinstance(value, list) and len(value) != len(rollout.response_ids):
                raise RewardError(
                    f"{self.function} returned {len(value)} numbers for {rollout.id}, which has {len(rollout.response_ids)} "
                    "tokens. Return one for each of `tokens`."
                )
        return values

    def _arguments(self, rollouts: Sequence[Rollout], takes: Mapping[str, Any]) -> dict[str, Any]:
        """All that there is, as far as the function takes it."""
        offered = {name: [r.prompt.extra.get(name) for r in rollouts] for r in rollouts for name in r.prompt.extra}
        offered |= {
            "prompts": [r.prompt.text for r in rollouts],
            "responses": [r.response for r in rollouts],
            "completions": [_as_trl(r) for r in rollouts],
            "messages": [r.prompt.messages for r in rollouts],
            "ended": [r.finish_reason == "stop" for r in rollouts],
        }
        if takes["any"] or "tokens" in takes["names"]:
            offered["tokens"] = [self.token_texts(r.response_ids) for r in rollouts]
        if missing := [name for name in takes["required"] if name not in offered]:
            raise RewardError(
                f"{self.function} asks for {', '.join(missing)}, which the data do not have. There are {', '.join(offered)}."
            )
        return {name: column for name, column in offered.items() if takes["any"] or name in takes["names"]}


class Worker:
    """A process with one function in it. It is started again after it was stopped or died."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.process: subprocess.Popen[str] | None = None
        self.parameters: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Unless it is there already."""
        if self.process is not None:
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quartet.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        threading.Thread(target=_log_lines, args=(self.process.stderr, self.function), daemon=True).start()
        answer = self._exchange({"function": self.function}, START_SECONDS)
        if answer is None:
            raise RewardError(f"{self.function} could not be imported within {START_SECONDS:g} s.")
        if "error" in answer:
            self.stop()
            raise RewardError(f"{self.function} cannot be used: {answer['error']}.")
        self.parameters = answer["parameters"]

    def call(self, arguments: Mapping[str, Any], timeout: float, count: int) -> list[Any]:
        answer = self._exchange({"arguments": arguments}, timeout)
        if answer is None:
            raise RewardError(
                f"{self.function} took longer than {timeout:g} s for {count} responses. Raise reward.timeout, give it more "
                "reward.processes, or let it return None for what it cannot judge in time."
            )
        if "error" in answer:
            raise RewardError(f"{self.function} failed: {answer['error']}. The traceback is in run.log.")
        values: list[Any] = answer["values"]
        return values

    def _exchange(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        """The answer; None where there was none in time, and the process is stopped."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None

        def ask() -> str:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(request, default=str) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                return ""
            return process.stdout.readline()

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            try:
                line = asked.result(timeout)
            except TooLong:
                process.kill()  # which ends the reading
                asked.exception()
                self.stop()
                return None
        if not line:
            code = process.wait()
            self.stop()
            raise RewardError(f"{self.function}: its process ended by itself (exit code {code}). What it said is in run.log.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def __del__(self) -> None:
        self.stop()


def _as_trl(rollout: Rollout) -> str | list[dict[str, str]]:
    """A completion as TRL's reward functions read it: text, or a list with the assistant's message in a conversation."""
    if rollout.prompt.messages is None:
        return rollout.response
    return [{"role": "assistant", "content": rollout.response}]


def check_reference(function: str, key: str = "reward.function") -> None:
    """A file that is not there, or does not define the name, is known without running it."""
    place, colon, name = function.rpartition(":")
    if not colon and "." in function:
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
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assigned = [
        n.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for n in node.targets if isinstance(n, ast.Name)
    ]
    imported = [a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    if name not in {*defined, *assigned, *imported}:
        there = f" It defines {', '.join(defined)}." if defined else ""
        raise RewardError(f'{key} = "{function}": {place} has no {name}.{there}')


def _log_lines(file: Any, function: str) -> None:
    with file:
        for line in file:
            log.info("%s: %s", function, line.rstrip())
