"""What `quartet serve-reward` does with requests that are wrong, hostile, slow or never finished."""

import json
import math
import os
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.io import http_server
from quartet.io.http_server import make_server
from quartet.rewards import serve
from quartet.rewards.serve import BadRequest, ScoringRequest, app, parsed, understood


@contextmanager
def serving(score):
    server = make_server(app(score), log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def lengths(asked):
    return [float(len(response)) for response in asked.responses]


@pytest.fixture(scope="module")
def port():
    with serving(lengths) as port:
        yield port


GOOD = {"prompts": ["the film"], "responses": ["was good"]}
OPENRLHF = {"prompts": ["ab"], "query": ["abcd"]}
TOO_MANY = serve.MAX_RESPONSES + 1
REFUSED = {
    "a number": (5, "must be an object"),
    "null": (None, "must be an object"),
    "a list": ([GOOD], "must be an object"),
    "nothing": ({}, '"responses" must be a list of texts'),
    "a text for responses": (GOOD | {"responses": "was good"}, '"responses" must be a list of texts'),
    "null in responses": (GOOD | {"responses": [None]}, '"responses" must be a list of texts'),
    "an object for prompts": (GOOD | {"prompts": {"0": "a"}}, '"prompts" must be a list of texts'),
    "other counts": (GOOD | {"responses": ["a", "b"]}, "1 prompts, 2 responses, 2 ended"),
    "messages = 5": (GOOD | {"messages": 5}, '"messages" must be a list'),
    "messages = true": (GOOD | {"messages": True}, '"messages" must be a list'),
    "messages = {}": (GOOD | {"messages": {}}, '"messages" must be a list'),
    "messages = text": (GOOD | {"messages": "hello"}, '"messages" must be a list'),
    "too few messages": (GOOD | {"messages": []}, '"messages" must be a list'),
    "too many messages": (GOOD | {"messages": [None, None]}, '"messages" must be a list'),
    "a number as conversation": (GOOD | {"messages": [5]}, "messages 0 is no list"),
    "an empty conversation": (GOOD | {"messages": [[]]}, "messages 0 is no list"),
    "a message without content": (GOOD | {"messages": [[{"role": "user"}]]}, "messages 0 is no list"),
    "a role of another type": (GOOD | {"messages": [[{"role": 1, "content": "a"}]]}, "messages 0 is no list"),
    "ended = 5": (GOOD | {"ended": 5}, '"ended" must be a list'),
    "ended = text": (GOOD | {"ended": "false"}, '"ended" must be a list'),
    "ended of texts": (GOOD | {"ended": ["false"]}, '"ended" must be a list'),
    "ended of another count": (GOOD | {"ended": []}, "1 prompts, 1 responses, 0 ended"),
    "half a pair": (GOOD | {"responses": ["\ud800"]}, 'text 0 of "responses" holds half a surrogate pair'),
    "half a pair in a query": ({"prompts": [""], "query": ["\udfff"]}, 'of "query" holds half a surrogate'),
    "half a pair in messages": (GOOD | {"messages": [[{"role": "user", "content": "\ud800"}]]}, "messages 0 is no list"),
    "too many": ({"prompts": [""] * TOO_MANY, "responses": [""] * TOO_MANY}, "4,096 at most"),
    "too many in OpenRLHF's": ({"prompts": [""] * TOO_MANY, "query": [""] * TOO_MANY}, "4,096 at most"),
    "another beginning": ({"prompts": ["b"], "query": ["abcd"]}, "query 0 does not begin with its prompt"),
    "other counts in OpenRLHF's": ({"prompts": ["a", "b"], "query": ["ab"]}, "1 queries, 2 prompts"),
    "a number for query": ({"prompts": ["a"], "query": 5}, '"query" must be a list of texts'),
}  # fmt: skip


@pytest.mark.parametrize(("table", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_cannot_be_used_is_answered_400_with_a_sentence(port, table, sentence):
    content, headers = json.dumps(table), {"content-type": "application/json"}
    reply = httpx.post(f"http://127.0.0.1:{port}/", content=content, headers=headers)
    assert reply.status_code == 400 and sentence in reply.json()["error"]


BODIES = {
    "not JSON": (b"<html>", 400),
    "nothing": (b"", 400),
    "half of JSON": (b'{"prompts": [', 400),
    "not UTF-8": (b'{"prompts": ["\xff"]}', 400),
    "UTF-16": ('{"prompts": ["a"]}'.encode("utf-16"), 400),
    "nested": (b"[" * 1_000_000, 400),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    "a number of 5,000 digits": (b'{"prompts": ' + b"9" * 5000 + b"}", 400),
    "too large": (b" " * (serve.MAX_BYTES + 1), 413),
}


@pytest.mark.parametrize(("body", "status"), BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_read_is_refused(port, body, status):
    reply = httpx.post(
        f"http://127.0.0.1:{port}/", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == status and reply.json()["error"]


def test_what_is_right_is_scored(port):
    url = f"http://127.0.0.1:{port}/"
    assert httpx.post(url, json=GOOD).json() == {"scores": [8.0]}
    assert httpx.post(url, json=OPENRLHF).json() == {
        "rewards": [2.0],
        "scores": [2.0],
        "extra_logs": {},
    }
    assert httpx.post(url, json=OPENRLHF | GOOD).json() == {"scores": [8.0]}, (
        "with responses it is Quartet's format"
    )
    assert httpx.post(url, json={"prompts": [], "responses": []}).json() == {"scores": []}
    conversation = [{"role": "user", "content": "hello", "name": "me"}]
    assert understood(GOOD | {"messages": [conversation], "ended": [False]}) == ScoringRequest(
        [conversation], ["was good"], [False]
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, None])
def test_a_score_that_is_no_number_is_null(number):
    with serving(lambda asked: [number, 1.0]) as port:
        reply = httpx.post(
            f"http://127.0.0.1:{port}/", json={"prompts": ["", ""], "responses": ["", ""]}
        )
    assert reply.status_code == 200 and reply.json() == {"scores": [None, 1.0]}


def test_a_scorer_that_fails_is_500_with_its_reason_and_the_next_request_is_scored():
    def picky(asked):
        if asked.responses[0] == "a":
            raise RuntimeError("out of \ud800 memory")
        return lengths(asked)

    with serving(picky) as port:
        url = f"http://127.0.0.1:{port}/"
        reply = httpx.post(url, json={"prompts": [""], "responses": ["a"]})
        assert reply.status_code == 500 and reply.json() == {
            "error": "scoring failed: out of \\ud800 memory"
        }
        assert httpx.post(url, json=GOOD).json() == {"scores": [8.0]}


# --- any JSON ------------------------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("QUARTET_FUZZ", "200"))
TEXTS = st.text(st.characters(codec=None), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)
KEYS = ("prompts", "responses", "query", "messages", "ended", "labels", "columns")
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "x"]), TEXTS | JSON, max_size=3), max_size=2
)
VALUES = (
    JSON
    | st.lists(TEXTS, max_size=3)
    | st.lists(MESSAGES | st.none(), max_size=3)
    | st.lists(st.booleans(), max_size=3)
)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(JSON | st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_of_any_json_nothing_but_a_request_or_a_sentence_comes(table):
    try:
        asked = understood(table)
    except BadRequest as error:
        str(error).encode("utf-8")
        return
    assert len(asked.prompts) == len(asked.responses) == len(asked.ended) <= serve.MAX_RESPONSES
    for text in asked.responses:
        text.encode("utf-8")


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_of_any_bytes_nothing_but_json_or_a_sentence_comes(body):
    try:
        parsed(body)
    except BadRequest as error:
        str(error).encode("utf-8")


# --- connections that stay -----------------------------------------------------------------------------------------------------

HEAD = b"POST / HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
WHOLE = json.dumps(GOOD).encode()
FIRST = HEAD.replace(b"100", b"%d" % len(WHOLE)) + b"\r\n" + WHOLE
SLOW = {
    "nothing": (b"", b"", ""),
    "half a header": (HEAD, b"", ""),
    "headers that drip": (HEAD, b"x-a: b\r\n", ""),
    "half a header of a second request": (FIRST + HEAD, b"", "200"),
    "headers of a second request that drip": (FIRST + HEAD, b"x-a: b\r\n", "200"),
    "half a body": (HEAD + b"\r\n{", b"", "408"),
    "a body that drips": (HEAD + b"\r\n{", b" ", "408"),
    "chunks that drip": (HEAD.replace(b"content-length: 100", b"transfer-encoding: chunked") + b"\r\n", b"1\r\n \r\n", "408"),
    "a body that drips for another type": (HEAD.replace(b"json", b"text") + b"\r\n{", b" ", "415"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("begin", "drop", "status"), SLOW.values(), ids=SLOW)
def test_a_request_that_is_never_finished_keeps_no_connection(monkeypatch, begin, drop, status):
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.3)
    with serving(lengths) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(0.05)
        connection.sendall(begin)
        reply, ended, begun = b"", False, time.monotonic()
        while not ended and time.monotonic() - begun < 20:
            try:
                if drop:
                    connection.sendall(drop)
                piece = connection.recv(65536)
                reply += piece
                ended = not piece
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended, "the server kept the connection for 20 s"
        assert status.encode() in reply.partition(b"\r\n")[0]
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_slow_scorer_is_waited_for_and_the_next_request_comes_over_the_same_connection(
    monkeypatch,
):
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)

    def slow(asked):
        time.sleep(0.7)
        return lengths(asked)

    with serving(slow) as port, httpx.Client() as client:
        ports = set()
        for _ in range(2):
            with client.stream("POST", f"http://127.0.0.1:{port}/", json=GOOD) as reply:
                ports.add(reply.extensions["network_stream"].get_extra_info("client_addr")[1])
                assert json.loads(reply.read()) == {"scores": [8.0]}
        assert len(ports) == 1
