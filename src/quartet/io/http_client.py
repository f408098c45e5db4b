"""An HTTP client for servers that may be slow, broken or hostile.

Each request is bounded as a whole, in seconds (looking up the name, connecting, sending, headers
and body together) and in bytes. One that exceeds its bound, or that its caller gives up, ends
alone: the others that are on their way over the same client are not touched.
"""

import asyncio
import functools
import json
import math
import os
import ssl
import threading
import weakref
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from quartet.errors import QuartetError
from quartet.io.texts import excerpt, well_formed_json
from quartet.io.threads import result_of

T = TypeVar("T")
IDLE = 1.0
"""Seconds after which a connection is not used again. Servers (uvicorn) close theirs after 5; a
request that is on its way then is lost."""
LONGEST_INTEGER = 400
"""Digits from which on an integer is read as a float, which is then infinite."""


class RequestError(QuartetError):
    """There is no whole reply. The message is a phrase that follows the server's name."""

    def __init__(self, phrase: str, again: bool) -> None:
        super().__init__(phrase)
        self.again = again
        """Whether the next try may succeed."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return what the body says, its texts well-formed. Raises ValueError where it is not JSON
        in UTF-8, or is nested too deeply to be meant."""
        try:
            value = json.loads(self.body.decode("utf-8-sig"), parse_int=_integer)
            return well_formed_json(value)
        except RecursionError:
            raise ValueError("nested too deeply") from None


class HttpClient:
    """Sends requests from any thread; they are all carried by one thread of its own, which starts
    with the first. Redirects are not followed, cookies not kept, compressed replies refused (a few
    kilobytes of them may hold gigabytes), TLS certificates verified."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self._headers = {"accept-encoding": "identity", **(headers or {})}
        self._starting = threading.Lock()
        self._carrier: _Carrier | None = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine that awaits `exchange`. Cancelling the future ends its request."""
        with self._starting:
            if self._carrier is None:
                self._carrier = _Carrier(self._headers)
                weakref.finalize(self, self._carrier.end)
            return asyncio.run_coroutine_threadsafe(coroutine, self._carrier.loop)

    def request(
        self, method: str, url: str, body: bytes | None, seconds: float, max_bytes: int
    ) -> Reply:
        """`exchange`, for callers in a thread."""
        future = self.start(self.exchange(method, url, body, seconds, max_bytes))
        try:
            return result_of(future)
        except CancelledError:
            raise RequestError(
                "was not heard to the end: the client was closed", again=False
            ) from None
        except BaseException:
            future.cancel()
            raise

    async def exchange(
        self, method: str, url: str, body: bytes | None, seconds: float, max_bytes: int
    ) -> Reply:
        """Return the whole reply, whatever its status; a `body` is sent as JSON. Raises
        RequestError."""
        assert self._carrier is not None
        try:
            async with asyncio.timeout(seconds):
                return await _exchange(self._carrier.client, method, url, body, seconds, max_bytes)
        except (TimeoutError, httpx.TimeoutException):
            raise RequestError(f"did not answer in {seconds:g} s", again=True) from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
            raise RequestError(f"cannot be asked ({_reason(error)})", again=False) from None
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise RequestError(f"cannot be reached ({_reason(error)})", again=True) from None

    def close(self) -> None:
        """End the thread and the connections. Requests on their way raise CancelledError in their
        callers; the client may be used again."""
        with self._starting:
            if self._carrier is not None:
                self._carrier.end()
            self._carrier = None


class _Carrier:
    """The thread, its event loop and the connections."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.loop = asyncio.new_event_loop()
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE)
        self.client = httpx.AsyncClient(
            headers=dict(headers), limits=limits, cookies=no_cookies, verify=_certificates()
        )
        self.thread = threading.Thread(target=self._run, name="http client", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.run_until_complete(
            self.loop.shutdown_asyncgens()
        )  # and sockets that wait to be closed
        self.loop.close()

    def end(self) -> None:
        if self.loop.is_closed() or not self.thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        if threading.current_thread() is not self.thread:
            self.thread.join(5.0)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()
        self.loop.stop()


async def _exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: bytes | None,
    seconds: float,
    max_bytes: int,
) -> Reply:
    headers = {} if body is None else {"content-type": "application/json"}
    # A connection and a TLS handshake that time out by themselves close their socket; cancelled
    # ones do not.
    timeout = httpx.Timeout(None, connect=seconds / 2)
    async with client.stream(
        method, url, content=body, headers=headers, timeout=timeout
    ) as response:
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            phrase = f"answered in the encoding {excerpt(encoding, 40)}, which was not asked for"
            raise RequestError(phrase, again=False)
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > max_bytes:
                raise RequestError(f"answered with more than {max_bytes:,} bytes", again=False)
        return Reply(response.status_code, response.headers, bytes(data))


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once, which takes a tenth of a second."""
    return httpx.create_ssl_context()


def _reason(error: BaseException) -> str:
    """What the innermost error says: "All connection attempts failed" is the outermost."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            return os.strerror(cause.errno) if cause.errno > 0 else excerpt(str(cause.strerror))
        cause = cause.__cause__ or cause.__context__
    return excerpt(str(error)).rstrip(".") or type(error).__name__


def _integer(text: str) -> int | float:
    if len(text) <= LONGEST_INTEGER:
        return int(text)
    return -math.inf if text.startswith("-") else math.inf


def encode(value: Any) -> bytes:
    """Return the value as JSON in ASCII: what JSON has no word for (dates, bytes) as text, half a
    surrogate pair as JSON's escape of it. Raises ValueError for NaN and infinity."""
    try:
        return json.dumps(value, default=str, allow_nan=False).encode("ascii")
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def error_in(answer: Any) -> str | None:
    """Return what an answer in JSON says under `error`, None where it says nothing. With one it is
    no answer, whatever else it holds and whatever its status."""
    if not isinstance(answer, dict) or not answer.get("error"):
        return None
    error = answer["error"]
    message = error.get("message") if isinstance(error, dict) else None
    return excerpt(str(message or error))
