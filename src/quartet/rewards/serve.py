"""A reward model behind HTTP: the server of `quartet serve-reward`, which `ServerReward` calls."""

import asyncio
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.errors import QuartetError
from quartet.io.texts import excerpt, well_formed
from quartet.rewards.protocol import Score

log = logging.getLogger(__name__)
MAX_BYTES = 16_000_000
MAX_RESPONSES = 4096
BODY_SECONDS = 60.0
"""Seconds within which the body of a request must arrive."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ScoringRequest:
    """The prompts and responses of a request. A prompt is a text or a conversation."""

    prompts: Sequence[Any]
    responses: Sequence[str]
    ended: Sequence[bool]


class BadRequest(QuartetError, ValueError):
    """A request that cannot be answered; the message is one sentence."""


def app(
    score: Callable[[ScoringRequest], list[Score]],
    token_env: str | None = None,
    hosts: Sequence[str] = LOOPBACK,
) -> Any:
    """Return a Starlette application.

    `POST /` takes Quartet's format, `{"prompts", "responses"}` with the optional `"messages"`
    (conversations instead of prompts) and `"ended"` (whether each response ended by itself; left
    out, all did), and answers `{"scores"}`; or OpenRLHF's, `{"query", "prompts"}`, and answers
    `{"rewards", "scores", "extra_logs"}`. `GET /health` answers ok. A number that is not finite is
    answered as null. Requests are read and scored one after another. Those for another host than
    `hosts` are refused: no page in a browser can reach it by a name of its own.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    token = os.environ.get(token_env, "") if token_env else ""
    turn = asyncio.Lock()

    def refuse(sentence: str, status: int) -> JSONResponse:
        return JSONResponse({"error": sentence}, status)

    async def respond(request: Request) -> Response:
        authorization = request.headers.get("authorization", "").encode()
        if token and not secrets.compare_digest(authorization, f"Bearer {token}".encode()):
            return refuse("the token is missing or wrong.", 401)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return refuse("send JSON, with content-type: application/json.", 415)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > MAX_BYTES:
                        return refuse(f"the request is larger than {MAX_BYTES:,} bytes.", 413)
        except TimeoutError:
            return refuse(f"the request did not come within {BODY_SECONDS:g} s.", 408)
        except ClientDisconnect:
            return Response(status_code=400)
        async with turn:
            return await run_in_threadpool(answer, bytes(body))

    def answer(body: bytes) -> JSONResponse:
        try:
            table = parsed(body)
            scores = score(understood(table))
        except BadRequest as error:
            return refuse(well_formed(str(error)), 400)
        except Exception as error:
            log.exception("a request could not be scored")
            return refuse(f"scoring failed: {excerpt(str(error)) or type(error).__name__}", 500)
        finite = [s if s is not None and math.isfinite(s) else None for s in scores]
        if is_openrlhf(table):
            return JSONResponse({"rewards": finite, "scores": finite, "extra_logs": {}})
        return JSONResponse({"scores": finite})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route("/", respond, methods=["POST"]), Route("/health", health)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def parsed(body: bytes) -> Any:
    """Return the JSON in the body of a request. Raises BadRequest."""
    try:
        return json.loads(body.decode("utf-8"))
    except RecursionError:
        raise BadRequest("the request is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {excerpt(str(error))}.") from None


def is_openrlhf(table: dict[str, Any]) -> bool:
    return "query" in table and "responses" not in table


def understood(table: Any) -> ScoringRequest:
    """Check a request in either format and return its prompts and responses. Raises BadRequest, and
    nothing else, whatever the JSON."""
    if not isinstance(table, dict):
        raise BadRequest("the request must be an object with prompts and responses.")
    if is_openrlhf(table):
        prompts, queries = _texts(table, "prompts"), _texts(table, "query")
        if len(prompts) != len(queries):
            raise BadRequest(f"{len(queries)} queries, {len(prompts)} prompts.")
        for i, (prompt, query) in enumerate(zip(prompts, queries, strict=True)):
            if not query.startswith(prompt):
                raise BadRequest(f"query {i} does not begin with its prompt.")
        responses = [query[len(prompt) :] for prompt, query in zip(prompts, queries, strict=True)]
        return ScoringRequest(prompts, responses, [True] * len(responses))
    responses, prompts = _texts(table, "responses"), _texts(table, "prompts")
    ended = table.get("ended")
    if ended is None:
        ended = [True] * len(responses)
    if not isinstance(ended, list) or not all(isinstance(e, bool) for e in ended):
        raise BadRequest('"ended" must be a list of true and false.')
    if len(prompts) != len(responses) or len(ended) != len(responses):
        raise BadRequest(
            f"{len(prompts)} prompts, {len(responses)} responses, {len(ended)} ended: must be as "
            f"many of each."
        )
    return ScoringRequest(_with_conversations(prompts, table.get("messages")), responses, ended)


def _with_conversations(prompts: Sequence[str], messages: Any) -> list[Any]:
    """Return the prompts, each replaced by its conversation where it has one."""
    if messages is None:
        return list(prompts)
    if not isinstance(messages, list) or len(messages) != len(prompts):
        raise BadRequest('"messages" must be a list with a conversation or null for each prompt.')
    for i, conversation in enumerate(messages):
        if conversation is not None and not _is_conversation(conversation):
            raise BadRequest(f"messages {i} is no list of {{role, content}}.")
    return [prompt if m is None else m for prompt, m in zip(prompts, messages, strict=True)]


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content"))
            for m in value
        )
    )


def _is_text(value: Any) -> bool:
    """Return whether a value is text that UTF-8 can hold, as tokenizers need it."""
    return isinstance(value, str) and well_formed(value) == value


def _texts(table: dict[str, Any], key: str) -> list[str]:
    texts = table.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f'"{key}" must be a list of texts.')
    if len(texts) > MAX_RESPONSES:
        raise BadRequest(f"{len(texts):,} {key}; {MAX_RESPONSES:,} at most in one request.")
    for i, text in enumerate(texts):
        if not _is_text(text):
            raise BadRequest(
                f'text {i} of "{key}" holds half a surrogate pair, which is no character.'
            )
    return texts
