"""Rewards from a server, over HTTP."""

import asyncio
import itertools
import math
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from typing import Any

from quartet.experience import Rollout
from quartet.io.http_client import HttpClient, Reply, RequestError, encode, error_in
from quartet.io.texts import excerpt
from quartet.io.threads import WAKE_SECONDS
from quartet.rewards.protocol import RewardError, Score, openrlhf_labels

FIRST_WAIT = 0.5
"""Seconds before the second try; each further wait is twice as long."""
MAX_BYTES = 8_000_000
"""Bytes of an answer: 300,000 scores. Parsed, an answer takes up to twenty times as much."""


class Endpoint:
    """An address that is sent JSON and answers with JSON, with as many tries as it takes.

    `timeout` is the time for one try as a whole. TLS certificates are verified. The token is read
    from an environment variable and sent as `Authorization: Bearer`; it is never written anywhere.
    An answer of more than `max_bytes` is not read to its end.
    """

    def __init__(
        self,
        what: str,
        url: str,
        timeout: float = 30.0,
        tries: int = 3,
        token_env: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.what, self.url, self.timeout = what, url, timeout
        self.tries, self.max_bytes = tries, max_bytes
        headers = {} if token_env is None else {"Authorization": f"Bearer {_token(token_env)}"}
        self._client = HttpClient(headers)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return the JSON that the server answers. Raises RewardError where it does not answer, or
        not with JSON, or with an error."""
        with closing(self.ask_each([request], 1)) as answers:
            _, answer = next(answers)
        if isinstance(answer, RewardError):
            raise answer
        return answer

    def ask_each(
        self, requests: Sequence[Mapping[str, Any]], parallel: int
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield the index of each request and its answer, or the RewardError in place of one, in
        the order in which they come. Requests that are on their way when the iterator is closed,
        or the caller interrupted, are given up."""
        pending: dict[Future[Any], int] = {}
        waiting = iter(enumerate(requests))
        try:
            while True:
                for i, request in itertools.islice(waiting, parallel - len(pending)):
                    pending[self._client.start(self._answer(request))] = i
                if not pending:
                    return
                for future in wait(pending, WAKE_SECONDS, FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self._client.close()

    async def _answer(self, request: Mapping[str, Any]) -> Any:
        try:
            return await self._tried(request)
        except RewardError as error:
            return error

    async def _tried(self, request: Mapping[str, Any]) -> Any:
        try:
            body = encode(request)
        except ValueError as error:
            raise RewardError(
                f"{self.what} {self.url} cannot be asked: the request is no JSON ({error})."
            ) from None
        pause, reason = 0.0, ""
        for attempt in range(self.tries):
            if attempt:
                await asyncio.sleep(max(pause, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                reply = await self._client.exchange(
                    "POST", self.url, body, self.timeout, self.max_bytes
                )
            except RequestError as error:
                if not error.again:
                    raise RewardError(f"{self.what} {self.url} {error}.") from None
                pause, reason = 0.0, str(error)
                continue
            if reply.status not in {408, 425, 429} and reply.status < 500:
                return self._read(reply)
            pause = min(_retry_after(reply), self.timeout)
            reason = f"answered {reply.status}{_complaint(reply)}"
        tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
        raise RewardError(f"{self.what} {self.url} {reason} ({tries}).")

    def _read(self, reply: Reply) -> Any:
        name, body = f"{self.what} {self.url}", excerpt(reply.body) or "(nothing)"
        if reply.status != 200:
            raise RewardError(f"{name} answered {reply.status}: {body}")
        try:
            answer = reply.json()
        except ValueError:
            raise RewardError(f"{name} answered with something that is not JSON: {body}") from None
        if (message := error_in(answer)) is not None:
            raise RewardError(f"{name} answered with an error: {message}")
        return answer


class ServerReward:
    """A server that is posted `{"prompts": […], "responses": […], "ended": […], "columns": {…}}`,
    and for conversations `"messages"`, and answers `{"scores": […]}`, one number or null for each
    response. With `protocol="openrlhf"`: `{"query": […], "prompts": […], "labels": […]}` for
    `{"rewards": […]}`, as OpenRLHF's remote reward models have it; `labels` are the rows' `label`,
    or else their `answer`."""

    def __init__(
        self, name: str, endpoint: Endpoint, protocol: str = "quartet", batch: int = 256
    ) -> None:
        self.name, self.endpoint, self.protocol, self.batch = name, endpoint, protocol, batch

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        made: list[Score] = []
        for start in range(0, len(rollouts), self.batch):
            made += self._scores(rollouts[start : start + self.batch])
        return made

    def _scores(self, rollouts: Sequence[Rollout]) -> list[Score]:
        request: dict[str, Any]
        if self.protocol == "openrlhf":
            labels = openrlhf_labels(rollouts)
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
        answer = self.endpoint.ask(request)
        name = f"reward server {self.endpoint.url}"
        scores = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f'{name} answered without a list "{key}".')
        if len(scores) != len(rollouts):
            values = f"{len(scores)} value{'s' * (len(scores) != 1)}"
            raise RewardError(f"{name} returned {values} for {len(rollouts)} responses.")
        for i, score in enumerate(scores):
            if type(score) not in (int, float, type(None)):
                shown = excerpt(repr(score), 60)
                raise RewardError(
                    f"{name} returned {shown} for response {i}, not a number or null."
                )
        return [None if score is None else _as_float(score) for score in scores]


def _as_float(score: int | float) -> float:
    try:
        return float(score)
    except OverflowError:  # an integer of hundreds of digits: no number of float32, like 1e308
        return math.inf


def _token(name: str) -> str:
    """Return the token in an environment variable."""
    token = os.environ.get(name)
    if not token:
        raise RewardError(
            f'reward.token_env = "{name}": no such environment variable. Set it to the token.'
        )
    if not all("!" <= letter <= "~" for letter in token):
        raise RewardError(
            f'reward.token_env = "{name}": holds letters that no token has, such as a space or a '
            f"line break."
        )
    return token


def _retry_after(reply: Reply) -> float:
    """Return the seconds of a Retry-After header; 0 where there is none, or where it is a date."""
    seconds = reply.headers.get("retry-after", "").strip()
    return float(seconds) if seconds.isascii() and seconds.isdecimal() else 0.0


def _complaint(reply: Reply) -> str:
    """Return the reason in the JSON of an error response."""
    try:
        message = error_in(reply.json())
    except ValueError:
        return ""
    return "" if message is None else f": {message}"
