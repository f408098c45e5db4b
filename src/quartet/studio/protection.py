"""Who may open the pages: browsers of this machine, or those that have the token; and the headers
of every page."""

import re
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "quartet_studio"
"""The cookie's name; the port follows, because a browser sends cookies to all ports of a host."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src "
    "'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every page. Only the studio's own files run as scripts, so a model's text cannot."""


class TokenNeeded:
    """Refuses requests without the token, which is first in the address, `?token=…`, and then in a
    cookie."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        port = re.search(r":(\d+)$", request.headers.get("host", ""))
        cookie = f"{COOKIE}_{port[1]}" if port else COOKIE
        if self._fits(request.cookies.get(cookie, "")):
            await self.app(scope, receive, send)
        elif self._fits(request.query_params.get("token", "")):
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            await answer(scope, receive, send)
        else:
            await HTMLResponse(
                "The address that the command printed has a token in it.", 401, HEADERS
            )(scope, receive, send)

    def _fits(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())


def protection(hosts: Sequence[str], token: str | None) -> list[Middleware]:
    """Return what stands before the pages: only these hosts are answered, and only with the token
    where there is one."""
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
        Middleware(GZipMiddleware, compresslevel=1),
    ]
    if token is not None:
        middleware.insert(0, Middleware(TokenNeeded, token=token))
    return middleware


def is_from_elsewhere(request: Request) -> bool:
    """Return whether a request comes from a page of another server."""
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def static_files() -> Mount:
    """Return the route of style sheets and scripts."""
    return Mount("/static", StaticFiles(packages=[("quartet.studio", "static")]))
