"""Rewards that can be checked: 1 where the response is right, 0 where it is not."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from quartet.experience import Rollout
from quartet.io.install import install_command
from quartet.rewards.protocol import RewardError, Score

NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?=\D|$)"
)
FINAL = "####"
"""GSM8K's mark before the final answer."""


class ExactMatch:
    """1 where the response is the answer in the prompt's row, white space around both aside."""

    def __init__(self, name: str = "exact", column: str = "answer") -> None:
        self.name, self.column = name, column

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [
            float(r.response.strip() == str(r.prompt.extra[self.column]).strip()) for r in rollouts
        ]


class NumberMatch:
    """1 where the response's final number is the answer's, as a number: 1,234.0 is 1234. Final is
    what follows the last `####` (GSM8K's convention; Cobbe et al. 2021), or else the last number in
    the text."""

    def __init__(self, name: str = "number", column: str = "answer") -> None:
        self.name, self.column = name, column

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        made: list[Score] = []
        for r in rollouts:
            wanted = final_number(str(r.prompt.extra[self.column]))
            if wanted is None:
                raise RewardError(
                    f"{r.prompt.id}: there is no number in its {self.column}: "
                    f"{r.prompt.extra[self.column]!r}."
                )
            made.append(float(final_number(r.response) == wanted))
        return made


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, or the last number of a text without the mark; None
    where there is none."""
    final = text.rpartition(FINAL)[2] if FINAL in text else text
    matches = NUMBER.findall(final.replace("−", "-"))
    numbers = [match for match in matches if any(c.isdigit() for c in match)]
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if FINAL in text else numbers[-1]).replace(",", ""))
    except InvalidOperation:
        return None


class MathMatch:
    """1 where the response's final expression equals the answer's, as mathematics (math-verify:
    numbers, fractions, LaTeX, sets, intervals). An expression that cannot be compared is wrong."""

    def __init__(self, name: str = "math", column: str = "answer", timeout: int = 5) -> None:
        try:
            import math_verify
        except ImportError:
            raise RewardError(
                f'reward.type = "math" needs the package math-verify: {install_command("math")}.'
            ) from None
        self.name, self.column, self.timeout, self.verifier = name, column, timeout, math_verify

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [float(self.equal(str(r.prompt.extra[self.column]), r.response)) for r in rollouts]

    def equal(self, answer: str, response: str) -> bool:
        parse, verify = self.verifier.parse, self.verifier.verify
        # A bare answer such as \frac12 is LaTeX that lacks its dollars.
        gold = parse(answer, parsing_timeout=self.timeout) or parse(
            f"${answer}$", parsing_timeout=self.timeout
        )
        parsed = parse(response, parsing_timeout=self.timeout)
        return bool(gold and parsed and verify(gold, parsed, timeout_seconds=self.timeout))


class PatternMatch:
    """1 where the regular expression is found in the response. `^`, `$` and `\\\\A`, `\\\\Z` anchor
    it; `.` matches line ends too."""

    def __init__(self, pattern: str, name: str = "pattern") -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise RewardError(
                f'reward.pattern = "{pattern}": not a regular expression ({error}).'
            ) from None
        self.name = name

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [float(self.pattern.search(r.response) is not None) for r in rollouts]


class JsonMatch:
    """1 where the response is JSON, and fits the schema where there is one (JSON Schema 2020-12,
    by jsonschema). A fence of three backticks around it is allowed."""

    def __init__(self, schema: dict[str, Any] | None = None, name: str = "json") -> None:
        self.name, self.validator = name, None
        if schema is not None:
            try:
                import jsonschema
            except ImportError:
                raise RewardError(
                    f"reward.schema needs the package jsonschema: {install_command('json')}."
                ) from None
            try:
                jsonschema.Draft202012Validator.check_schema(schema)
            except jsonschema.SchemaError as error:
                raise RewardError(f"reward.schema: not a JSON schema ({error.message}).") from None
            self.validator = jsonschema.Draft202012Validator(schema)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [float(self._fits(r.response)) for r in rollouts]

    def _fits(self, text: str) -> bool:
        fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", text, re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (json.JSONDecodeError, RecursionError):
            return False
        return self.validator is None or bool(self.validator.is_valid(value))


class LengthWithin:
    """1 for a response of `least` to `most` tokens; outside, less by the share that is missing or
    too much, and not below
    0. With 10 to 20: 5 tokens give 0.5, 25 give 0.75."""

    def __init__(self, least: int, most: int, name: str = "length") -> None:
        self.name, self.least, self.most = name, least, most

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self._worth(len(r.response_ids)) for r in rollouts]

    def _worth(self, tokens: int) -> float:
        if tokens < self.least:
            return tokens / self.least
        return max(1 - max(tokens - self.most, 0) / self.most, 0.0)
