"""Programs that the policy wrote, against the tests of the prompt's row."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quartet.experience import Rollout
from quartet.io.threads import map_concurrently
from quartet.rewards.protocol import RewardError, Score
from quartet.rewards.sandbox import Sandbox

HARNESS = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
space = {{"__name__": "solution"}}
exec(compile({program!r}, "solution.py", "exec"), space)
for call in {calls!r}:
    try:
        said = json.dumps([eval(call, space)])
    except Exception as error:
        said = json.dumps(None)
    answers.write(said + "\\n")
    answers.flush()
"""


class CodeReward:
    """1 where the program in the response passes all tests of its row, else 0; with `share`, the
    share that it passes.

    A test is `{"input": …, "output": …}`, standard input and what must come out of it (white space
    at line ends aside), or `{"call": "add(2, 3)", "result": 5}`, an expression and its value as
    JSON. Values and outputs are compared here, outside: what is expected never enters the sandbox,
    so there is no verdict in it that a program could forge.
    """

    def __init__(
        self,
        name: str,
        sandbox: Sandbox,
        column: str = "tests",
        score: Literal["all", "share"] = "all",
        parallel: int = 2,
    ) -> None:
        self.name = name
        self.sandbox = sandbox
        self.column = column
        self.kind = score
        self.parallel = parallel

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return map_concurrently(self._score, rollouts, self.parallel)

    def _score(self, rollout: Rollout) -> Score:
        tests = checked_tests(rollout.prompt.id, self.column, rollout.prompt.extra[self.column])
        passed = self.passed(program_in(rollout.response), tests)
        share = sum(passed) / len(passed)
        return share if self.kind == "share" else float(share == 1)

    def passed(self, program: str, tests: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Return, for each test, whether a program passes it."""
        calls = [test["call"] for test in tests if "call" in test]
        values = iter(self._values(program, calls) if calls else [])
        made = []
        for test in tests:
            if "call" in test:
                value = next(values, None)
                made.append(value is not None and same_json(value, [test["result"]]))
            else:
                ran = self.sandbox.run(program, test["input"])
                made.append(ran.code == 0 and _lines(ran.output) == _lines(test["output"]))
        return made

    def _values(self, program: str, calls: Sequence[str]) -> list[Any]:
        """Return the value of each expression as a list of one, or None where it failed; fewer than
        the calls where the program ended early."""
        ran = self.sandbox.run(HARNESS.format(program=program, calls=list(calls)))
        values = []
        for line in ran.output.split("\n")[: len(calls)]:
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                values.append(None)
        return values


def same_json(a: Any, b: Any) -> bool:
    """Return whether two JSON values are the same. Numbers compare by value (1 and 1.0 are the
    same); `true` is not 1, which Python's `==` says it is, nor `false` 0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    return bool(a == b)


def program_in(response: str) -> str:
    """Return the last fenced block of a response, or the whole response without one."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.DOTALL)
    return blocks[-1] if blocks else response


def checked_tests(place: str, column: str, cell: Any) -> list[Mapping[str, Any]]:
    """Return the tests in a row's cell, which is a list or JSON text of one. Raises
    `RewardError` where they are not well formed."""
    try:
        tests = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        raise RewardError(
            f"{place}: {column} is text that is not JSON; it must be a list of tests."
        ) from None
    if not isinstance(tests, list) or not tests:
        raise RewardError(f"{place}: {column} must be a list of tests, and not an empty one.")
    for number, test in enumerate(tests):
        asks = isinstance(test, dict) and isinstance(test.get("call"), str) and "result" in test
        reads = isinstance(test, dict) and all(
            isinstance(test.get(key), str) for key in ("input", "output")
        )
        if not asks and not reads:
            raise RewardError(
                f'{place}: test {number} has neither "call" and "result" nor "input" and "output" '
                f"(texts)."
            )
    return tests


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
