"""Rewards that another process gives, over HTTP."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from typing import Any

import httpx

from quartet.experience import Rollout
from quartet.rewards.protocol import RewardError, Score

FIRST_WAIT = 0.5
"""Seconds before the second try; each further wait is twice as long."""


class Endpoint:
    """An address that is asked with JSON and answers with JSON, with as many tries as it takes.

    TLS certificates are verified. The token is read from an environment variable and sent as `Authorization: Bearer`; it is
    never written anywhere. An answer of more than `max_bytes` is not read to its end.
    """

    def __init__(
        self,
        what: str,
        url: str,
        timeout: float = 30.0,
        tries: int = 3,
        token_env: str | None = None,
        max_bytes: int = 64_000_000,
    ) -> None:
        self.what, self.url, self.timeout, self.tries, self.max_bytes = what, url, timeout, tries, max_bytes
        headers = {}
        if token_env is not None:
            if not os.environ.get(token_env):
                raise RewardError(f'reward.token_env = "{token_env}": no such environment variable. Set it to the token.')
            if not os.environ[token_env].isascii() or not os.environ[token_env].isprintable():
                raise RewardError(f'reward.token_env = "{token_env}": holds letters that no token has, such as a line break.')
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.headers = headers
        self.client = self._connected()

    def _connected(self) -> httpx.Client:
        return httpx.Client(headers=self.headers, timeout=self.timeout, follow_redirects=False)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """What the server answered; RewardError where it did not, or not with JSON."""
        wait, reason = FIRST_WAIT, ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(wait)
                wait *= 2
            try:
                status, body = self._in_time(request)
            except (httpx.TimeoutException, TooLong):
                reason = f"did not answer in {self.timeout:g} s"
                continue
            except httpx.TransportError as error:
                reason = f"cannot be reached ({str(error).rstrip('.') or type(error).__name__})"
                continue
            except (httpx.RequestError, httpx.InvalidURL) as error:
                raise RewardError(f"{self.what} {self.url}: {str(error).rstrip('.')}.") from None
            if status in {408, 425, 429} or status >= 500:
                reason = f"answered {status}"
                continue
            if status != 200:
                raise RewardError(f"{self.what} {self.url} answered {status}: {_start(body)}")
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise RewardError(f"{self.what} {self.url} answered with something that is not JSON: {_start(body)}") from None
        raise RewardError(f"{self.what} {self.url} {reason} ({self.tries} {'try' if self.tries == 1 else 'tries'}).")

    def _in_time(self, request: Mapping[str, Any]) -> tuple[int, bytes]:
        """The whole answer within the timeout: a server that sends a byte now and then would keep the connection for ever."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self._post, request)
            try:
                return answer.result(self.timeout)
            except TooLong:
                self.client.close()  # which ends the reading
                self.client = self._connected()
                raise

    def _post(self, request: Mapping[str, Any]) -> tuple[int, bytes]:
        with self.client.stream("POST", self.url, json=request) as response:
            body = b""
            for piece in response.iter_bytes():
                body += piece
                if len(body) > self.max_bytes:
                    raise RewardError(f"{self.what} {self.url} answered with more than {self.max_bytes:,} bytes.")
            return response.status_code, body


class ServerReward:
    """A server that is posted `{"prompts": […], "responses": […], "ended": […], "columns": {…}}`, and for conversations
    `"messages"`, and answers `{"scores": […]}`, one number or null for each response. With `protocol="openrlhf"`:
    `{"query": […], "prompts": […], "labels": […]}` for `{"rewards": […]}`, as OpenRLHF's remote reward models have it; `labels`
    are the rows' `label`, or else their `answer`."""

    def __init__(self, name: str, endpoint: Endpoint, protocol: str = "quartet", batch: int = 256) -> None:
        self.name, self.endpoint, self.protocol, self.batch = name, endpoint, protocol, batch

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        made: list[Score] = []
        for start in range(0, len(rollouts), self.batch):
            made += self._scores(rollouts[start : start + self.batch])
        return made

    def _scores(self, rollouts: Sequence[Rollout]) -> list[Score]:
        request: dict[str, Any]
        if self.protocol == "openrlhf":
            labels = [r.prompt.extra.get("label", r.prompt.extra.get("answer")) for r in rollouts]
            request = {
                "query": [r.prompt.text + r.response for r in rollouts],
                "prompts": [r.prompt.text for r in rollouts],
                "labels": labels,
            }
            key = "rewards"
        else:
            names = dict.fromkeys(name for r in rollouts for name in r.prompt.extra)
            request = {
                "prompts": [r.prompt.text for r in rollouts],
                "responses": [r.response for r in rollouts],
                "ended": [r.finish_reason == "stop" for r in rollouts],
                "columns": {name: [r.prompt.extra.get(name) for r in rollouts] for name in names},
            }
            if any(r.prompt.messages for r in rollouts):
                request["messages"] = [r.prompt.messages for r in rollouts]
            key = "scores"
        answer = self.endpoint.ask(json_ready(request))
        scores = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f'reward server {self.endpoint.url} answered without a list "{key}".')
        if len(scores) != len(rollouts):
            raise RewardError(
                f"reward server {self.endpoint.url} returned {len(scores)} value{'s' * (len(scores) != 1)} for "
                f"{len(rollouts)} responses."
            )
        for i, score in enumerate(scores):
            if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
                raise RewardError(
                    f"reward server {self.endpoint.url} returned {score!r} for response {i}, not a number or null."
                )
        return [None if score is None else _as_float(score) for score in scores]


def _as_float(score: int | float) -> float:
    try:
        return float(score)
    except OverflowError:  # an integer of hundreds of digits: no number of float32, like 1e308
        return math.inf


def json_ready(value: Any) -> Any:
    """The value with whatever JSON has no word for (dates, bytes) as text."""
    return json.loads(json.dumps(value, default=str))


def _start(body: bytes) -> str:
    text = body.decode("utf-8", errors="replace").strip()
    return (text[:200] + " …" if len(text) > 200 else text) or "(nothing)"
