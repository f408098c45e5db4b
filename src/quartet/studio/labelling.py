"""The page on which people compare answers, in the studio's look. Each choice is on the disk before
the page goes on."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from quartet import __version__
from quartet.labels.agreement import agreements
from quartet.labels.log import LabelError
from quartet.labels.session import AlreadyLabelled, BadLabel, LabelSession, Task, checked_name
from quartet.runs.untrusted import printable
from quartet.studio.protection import HEADERS, LOOPBACK, is_from_elsewhere, protection, static_files
from quartet.studio.rendering import templates

MAX_BODY = 64 * 1024
"""The longest request, in bytes."""
STATUS = {BadLabel: 400, AlreadyLabelled: 409, LabelError: 507}

Body = Mapping[str, str]


class LabelPages:
    """The page, and the requests that it sends."""

    def __init__(self, session: LabelSession, title: str) -> None:
        self.session, self.title = session, printable(title)

    async def page(self, _: Request) -> Response:
        text = (
            templates()
            .get_template("label.html")
            .render(version=__version__, title=f"Label {self.title}", name=self.title, run=None)
        )
        return HTMLResponse(text, headers={**HEADERS, "Cache-Control": "no-store"})

    def posted(self, answer: Callable[[Body], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Return a request handler that calls `answer` with the texts of a posted JSON object."""

        async def respond(request: Request) -> Response:
            if is_from_elsewhere(request):
                return _json({"error": "only the labelling page itself may send labels."}, 403)
            try:
                body = await _body(request)
                return _json(await run_in_threadpool(answer, body))
            except (BadLabel, AlreadyLabelled, LabelError) as error:
                return _json({"error": str(error)}, STATUS[type(error)])

        return respond

    def next(self, body: Body) -> dict[str, Any]:
        name = checked_name(_text(body, "labeller"))
        tab = _text(body, "tab")
        return self._state(name, tab, self.session.task(name, tab, body.get("load", "")))

    def label(self, body: Body) -> dict[str, Any]:
        label = self.session.take(
            _text(body, "labeller"),
            _text(body, "tab"),
            _text(body, "id"),
            _text(body, "task"),
            _text(body, "choice"),
            body.get("comment", ""),
        )
        return {"saved": label.id}

    def undo(self, body: Body) -> dict[str, Any]:
        name = checked_name(_text(body, "labeller"))
        tab = _text(body, "tab")
        task = self.session.undo(name, tab, body.get("label", ""))
        if task is None:
            raise BadLabel("This tab has no label to undo.")
        return self._state(name, tab, task)

    def release(self, body: Body) -> dict[str, Any]:
        self.session.release(_text(body, "tab"), body.get("load", ""))
        return {}

    def _state(self, labeller: str, tab: str, task: Task | None) -> dict[str, Any]:
        progress = self.session.progress(labeller)
        found = agreements(list(self.session.labels.values()))
        state = {
            "done": progress.done,
            "total": progress.total,
            "last": self.session.last(labeller, tab),
            "agreement": [
                printable(agreement.sentence())
                for agreement in found
                if labeller in (agreement.first, agreement.second)
            ],
        }
        if task is None:
            return state | {"task": None}
        first, second = task.shown
        shown = {
            "id": task.id,
            "prompt": _turns(task.pair.prompt),
            "first": _turns(first),
            "second": _turns(second),
        }
        return state | {"task": shown}


def make_label_app(
    session: LabelSession,
    title: str,
    hosts: Sequence[str] = LOOPBACK,
    token: str | None = None,
) -> Starlette:
    """Return the app that hands out the pairs of a session. `token` is what a browser must send;
    None means that no token is needed."""
    pages = LabelPages(session, title)
    posts = {
        "/api/next": pages.next,
        "/api/label": pages.label,
        "/api/undo": pages.undo,
        "/api/release": pages.release,
    }
    routes = [Route("/", pages.page)]
    routes += [Route(path, pages.posted(make), methods=["POST"]) for path, make in posts.items()]
    return Starlette(routes=[*routes, static_files()], middleware=protection(hosts, token))


async def _body(request: Request) -> Body:
    """Return the posted object. Only JSON is taken, which no form of another page can send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise BadLabel("The content type must be application/json.")
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:
            raise BadLabel(f"The request is longer than {MAX_BODY:,} bytes.")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise BadLabel("The request is not JSON.") from None
    if not isinstance(body, dict) or not all(isinstance(value, str) for value in body.values()):
        raise BadLabel("The request must be an object of texts.")
    return body


def _text(body: Body, key: str) -> str:
    if not body.get(key):
        raise BadLabel(f"The request has no {key}.")
    return body[key]


def _turns(text: Any) -> list[dict[str, str]]:
    """Return a text as turns with a role; plain text has none."""
    if isinstance(text, str):
        return [{"role": "", "content": text}]
    return [
        {"role": str(turn.get("role", "")), "content": str(turn.get("content", ""))}
        for turn in text
    ]


def _json(value: Any, status: int = 200) -> Response:
    return JSONResponse(value, status, {**HEADERS, "Cache-Control": "no-store"})
