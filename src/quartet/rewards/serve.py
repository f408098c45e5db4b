"""A reward model behind HTTP: what `quartet serve-reward` runs, and what `ServerReward` asks."""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.rewards.protocol import Score

MAX_BYTES = 64_000_000
MAX_RESPONSES = 4096


@dataclass(frozen=True)
class Asked:
    """What a request wants scored. A prompt is text or a conversation."""

    prompts: Sequence[Any]
    responses: Sequence[str]
    ended: Sequence[bool]


class BadRequest(ValueError):
    """One sentence about a request."""


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def app(score: Callable[[Asked], list[Score]], token_env: str | None = None, hosts: Sequence[str] = LOOPBACK) -> Any:
    """A Starlette application. `POST /` takes Quartet's format, `{"prompts", "responses"}` with, as one likes, `"messages"`
    (conversations instead of prompts) and `"ended"` (whether each response ended by itself; else all did), and answers
    `{"scores"}`; or OpenRLHF's, `{"query", "prompts"}` for `{"rewards", "scores", "extra_logs"}`. `GET /health` says ok.
    Requests for another host than `hosts` are refused: no page in a browser can reach it by a name of its own."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    token = os.environ.get(token_env, "") if token_env else ""

    async def respond(request: Request) -> JSONResponse:
        if token and not secrets.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "the token is missing or wrong."}, 401)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "send JSON, with content-type: application/json."}, 415)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BYTES:
                return JSONResponse({"error": f"the request is larger than {MAX_BYTES:,} bytes."}, 413)
        try:
            table = json.loads(body)
            asked = understood(table)
            scores = await run_in_threadpool(score, asked)
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, 400)
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": f"the request cannot be used: {error}"}, 400)
        if "query" in table:
            return JSONResponse({"rewards": scores, "scores": scores, "extra_logs": {}})
        return JSONResponse({"scores": scores})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route("/", respond, methods=["POST"]), Route("/health", health)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def understood(table: Any) -> Asked:
    """A request in either format, checked."""
    if not isinstance(table, dict):
        raise BadRequest("the request must be an object with prompts and responses.")
    if "query" in table and "responses" not in table:
        prompts, whole = _texts(table, "prompts"), _texts(table, "query")
        if len(prompts) != len(whole):
            raise BadRequest(f"{len(whole)} queries, {len(prompts)} prompts.")
        apart = [i for i, (p, w) in enumerate(zip(prompts, whole, strict=True)) if not w.startswith(p)]
        if apart:
            raise BadRequest(f"query {apart[0]} does not begin with its prompt.")
        responses = [w[len(p) :] for p, w in zip(prompts, whole, strict=True)]
        return Asked(prompts, responses, [True] * len(responses))
    responses = _texts(table, "responses")
    if len(responses) > MAX_RESPONSES:
        raise BadRequest(f"{len(responses):,} responses; {MAX_RESPONSES:,} at most in one request.")
    asked: list[Any] = list(_texts(table, "prompts"))
    for i, messages in enumerate(table.get("messages") or []):
        if messages is not None and i < len(asked):
            fits = isinstance(messages, list) and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
            )
            if not fits:
                raise BadRequest(f"messages {i} is no list of {{role, content}}.")
            asked[i] = messages
    ended = table.get("ended") or [True] * len(responses)
    if len(asked) != len(responses) or len(ended) != len(responses):
        raise BadRequest(f"{len(asked)} prompts, {len(responses)} responses, {len(ended)} ended: must be as many of each.")
    return Asked(asked, responses, [bool(e) for e in ended])


def _texts(table: dict[str, Any], key: str) -> list[str]:
    texts = table.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f'"{key}" must be a list of texts.')
    return texts
