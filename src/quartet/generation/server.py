"""A generation server as a run knows it, and what its replies must be."""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quartet.errors import QuartetError
from quartet.generation.transfer import TransferFailed
from quartet.io.http_client import Reply, RequestError, error_in
from quartet.io.texts import excerpt

log = logging.getLogger(__name__)
PAUSE = 0.5
"""Seconds before a server that failed is tried again."""


class ServersGone(QuartetError, RuntimeError):
    """No server answers. The message names the servers and their last errors."""


class ServersAwake(QuartetError, RuntimeError):
    """A server cannot be put to sleep, so it keeps the memory of its GPU."""


class BadReply(QuartetError):
    """A reply is an error or has another form. The message is a phrase that follows the server's
    name."""

    def __init__(self, phrase: str, status: int = 200) -> None:
        super().__init__(phrase)
        self.status = status


FAILURES = (RequestError, BadReply, TransferFailed)


@dataclass
class Server:
    """A server and its state."""

    url: str
    version: int = -1
    """The version of its weights; −1 means that it is not known."""
    asleep: bool = False
    """Whether it sleeps, or may do so."""
    working: int = 0
    """The number of requests in flight."""
    failed: str | None = None
    """Why it gets no requests; None while it works."""
    again: float = 0.0
    """The time.monotonic() from which it may be tried again."""
    complaint: str | None = None
    """The last reason that was logged."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, reason: str) -> None:
        """Stop sending requests for a while. Each new reason is logged once."""
        self.failed, self.again = reason, time.monotonic() + PAUSE
        if reason != self.complaint:
            self.complaint = reason
            log.warning(
                "generation server %s %s. It is left alone until it answers again.",
                self.url,
                reason,
            )


def accepted(reply: Reply) -> None:
    """Raise BadReply where a server refuses a request, even if the status is 200."""
    if not 200 <= reply.status < 300:
        raise BadReply(
            f"answered {reply.status}: {excerpt(reply.body, 300)}".rstrip(" :."), reply.status
        )
    with contextlib.suppress(ValueError):
        table = reply.json()
        if (message := error_in(table)) is not None:
            raise BadReply(f"answered with an error: {message}")
        if isinstance(table, dict) and table.get("success") is False:
            raise BadReply(f"refused: {excerpt(reply.body, 300)}")


def json_table(reply: Reply) -> Mapping[str, Any]:
    """Return a reply's JSON object. Raises BadReply where it is something else."""
    accepted(reply)
    if reply.status != 200:
        raise BadReply(
            f"answered {reply.status}: {excerpt(reply.body) or '(nothing)'}", reply.status
        )
    try:
        table = reply.json()
    except ValueError:
        raise BadReply(
            f"answered with something that is not JSON: {excerpt(reply.body) or '(nothing)'}"
        ) from None
    if not isinstance(table, dict):
        raise BadReply(f"answered with something that is no object: {excerpt(reply.body)}")
    return table
