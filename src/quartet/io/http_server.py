"""An HTTP server whose connections do not stay open for ever."""

import logging
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""How long a connection may take to send the headers of a request."""
MAX_CONNECTIONS = 256
"""Further ones are answered 503."""


class HeaderDeadline(H11Protocol):
    """uvicorn's protocol, which waits for headers without end, with a deadline for them: for the
    first request from when the connection is made, for the next from the end of the answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_headers()

    def _await_headers(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._close_without_headers, self.cycle)

    def _close_without_headers(self, last_cycle: Any) -> None:
        """Every request whose headers are complete has a cycle of its own."""
        if self.cycle is last_cycle and not self.transport.is_closing():
            self.transport.abort()


def make_server(
    app: Any, host: str = "127.0.0.1", port: int = 0, log_level: str | int = logging.WARNING
) -> uvicorn.Server:
    """Return a server for an application, to be run with `server.run(sockets=[…])`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=HeaderDeadline,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            log_level=log_level,
            access_log=False,
        )
    )
