"""Servers that answer wrongly, partly, slowly or not at all."""

import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from quartet.rewards import remote
from quartet.rewards.judge import JudgeReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded, with_score
from quartet.rewards.remote import Endpoint, ServerReward
from tests.malformed.saying import readable, refusal
from tests.support.world import prompts, rollout

LIMIT = 0.3
"""Seconds that an answer may take here; two tries."""
Answering = Callable[[socket.socket, threading.Event], None]


class Server:
    """Reads a request on each connection, then lets a function write what it likes."""

    def __init__(self, answer: Answering) -> None:
        self.answer, self.ended, self.threads = answer, threading.Event(), []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.settimeout(0.05)
        self.port = self.listening.getsockname()[1]

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join(5)
        self.listening.close()

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self):
        while not self.ended.is_set():
            try:
                connection, _ = self.listening.accept()
            except TimeoutError:
                continue
            self._start(self._talk, connection)

    def _talk(self, connection):
        with connection:
            try:
                connection.settimeout(1.0)
                read(connection)
                self.answer(connection, self.ended)
            except OSError:
                pass  # the client has gone


def read(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += (piece := connection.recv(65536))
        if not piece:
            raise ConnectionError
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    left = int(length[1]) - len(body) if length else 0
    while left > 0:
        left -= len(connection.recv(65536))


def raw(data):
    return lambda connection, ended: connection.sendall(data)


def answers(status, body=b"", *headers):
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def says(table):
    return answers(200, json.dumps(table).encode())


def scores(text):
    return answers(200, b'{"scores": [' + text + b"]}")


def again(piece, pause, begin=b"HTTP/1.1 200 OK\r\n"):
    """The same piece again and again, for ever."""

    def answer(connection, ended):
        connection.sendall(begin)
        while not ended.is_set():
            connection.sendall(piece)
            time.sleep(pause)

    return answer


def reset(connection, ended):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def silent(connection, ended):
    ended.wait(20)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def asked():
    return [rollout(prompt, (5, 6), 0.0, i, i) for i, prompt in enumerate(prompts(3))]


def said_of(answer, scheme="http", made=lambda endpoint: ServerReward("server", endpoint), what="reward server"):
    """What a step says that asks this server, with SERVER for its address."""
    with Server(answer) as server:
        url = f"{scheme}://127.0.0.1:{server.port}/score"
        endpoint = Endpoint(what, url, timeout=LIMIT, tries=2, max_bytes=2000)
        reward = made(endpoint)
        begun = time.monotonic()
        try:
            said = refusal(RewardError, lambda: with_score(rewarded(asked(), [Weighted(reward)])))
        finally:
            endpoint.close()
        assert time.monotonic() - begun < 10
        return said.replace(url, "SERVER")


NOTHING = "none of 3 responses has a score from server: there is nothing to learn from."
NO_JSON = "reward server SERVER answered with something that is not JSON: "
NO_LIST = 'reward server SERVER answered without a list "scores".'
LATE = f"reward server SERVER did not answer in {LIMIT} s (2 tries)."
LOST = "reward server SERVER cannot be reached ("
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

ANSWERS = {
    "500": (answers(500, b"<html>boom</html>"), "reward server SERVER answered 500 (2 tries)."),
    "503": (answers(503), "reward server SERVER answered 503 (2 tries)."),
    "429": (answers(429, b"slow down"), "reward server SERVER answered 429 (2 tries)."),
    "408": (answers(408), "reward server SERVER answered 408 (2 tries)."),
    "404": (answers(404, b"no such page"), "reward server SERVER answered 404: no such page"),
    "401": (answers(401), "reward server SERVER answered 401: (nothing)"),
    "413": (answers(413, b"too long"), "reward server SERVER answered 413: too long"),
    "201": (answers(201, b"made"), "reward server SERVER answered 201: made"),
    "204": (answers(204), "reward server SERVER answered 204: (nothing)"),
    "a redirect": (answers(302, b"", "location: http://169.254.169.254/"), "reward server SERVER answered 302: (nothing)"),
    "a long complaint": (answers(400, b"y" * 1900), "answered 400: " + "y" * 200 + " …"),
    "a page": (answers(200, b"<html><body>log in</body></html>"), NO_JSON + "<html><body>log in</body></html>"),
    "nothing": (answers(200), NO_JSON + "(nothing)"),
    "half of JSON": (answers(200, b'{"scores": [1, 2'), NO_JSON + '{"scores": [1, 2'),
    "less than it is long": (raw(b'HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{"scores": [1, 2, 3]}'), NO_JSON + '{"s'),
    "brackets without end": (answers(200, b"[" * 1900), NO_JSON + "[" * 200 + " …"),
    "a list": (says([1, 2, 3]), NO_LIST),
    "null": (says(None), NO_LIST),
    "another name": (says({"rewards": [1, 2, 3]}), NO_LIST),
    "a text of scores": (says({"scores": "123"}), NO_LIST),
    "a table of scores": (says({"scores": {"0": 1}}), NO_LIST),
    "too few": (scores(b"1"), "reward server SERVER returned 1 value for 3 responses."),
    "none": (scores(b""), "reward server SERVER returned 0 values for 3 responses."),
    "too many": (scores(b"1, 2, 3, 4"), "reward server SERVER returned 4 values for 3 responses."),
    "texts": (says({"scores": ["a", 1, 2]}), "reward server SERVER returned 'a' for response 0, not a number or null."),
    "lists": (scores(b"[1], [2], [3]"), "reward server SERVER returned [1] for response 0, not a number or null."),
    "true": (scores(b"1, true, 3"), "reward server SERVER returned True for response 1, not a number or null."),
    "nulls": (scores(b"null, null, null"), NOTHING),
    "NaN": (scores(b"NaN, NaN, NaN"), NOTHING),
    "infinity": (scores(b"Infinity, -Infinity, Infinity"), NOTHING),
    "1e308": (scores(b"1e308, 1e308, -1e308"), NOTHING),
    "1e400": (scores(b"1e400, 1e400, 1e400"), NOTHING),
    "too many bytes": (answers(200, b"x" * 5000), "reward server SERVER answered with more than 2,000 bytes."),
    "too many bytes in few": (answers(200, gzip.compress(b" " * 10**6), "content-encoding: gzip"), "answered in the encoding gzip, which was not asked for."),
    "chunks without end": (again(b"100\r\n" + b" " * 256 + b"\r\n", 0, CHUNKED), "answered with more than 2,000 bytes."),
    "headers without end": (again(b"x-a: b\r\n" * 100, 0), LOST),
    "a reset": (reset, LOST),
    "a closed connection": (raw(b""), LOST + "Server disconnected without sending a response) (2 tries)."),
    "half a header": (raw(b"HTTP/1.1 200 OK\r\ncontent-le"), LOST),
    "half a body": (raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), LOST + "peer closed connection without sending complete message body"),
    "another protocol": (raw(b"SSH-2.0-OpenSSH_9.0\r\n"), LOST),
    "a length below zero": (raw(b"HTTP/1.1 200 OK\r\ncontent-length: -3\r\n\r\n{}"), LOST + "bad Content-Length) (2 tries)."),
    "a chunk of no length": (raw(CHUNKED + b"zz\r\n{}\r\n"), LOST),
    "silence": (silent, LATE),
    "a body that drips": (again(b" ", 0.05, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"), LATE),
    "headers that drip": (again(b"x", 0.05), LATE),
    "chunks that drip": (again(b"1\r\n \r\n", 0.05, CHUNKED), LATE),
    "continue, for ever": (again(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05, b""), LATE),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "sentence"), ANSWERS.values(), ids=ANSWERS)
def test_what_a_server_answers(answer, sentence):
    assert sentence in said_of(answer)


def test_tls_where_there_is_none():
    """What is said depends on who loses patience first; that it ends does not."""
    assert re.search(r"SERVER (cannot be reached|did not answer)", said_of(says({"scores": [1, 2, 3]}), "https"))


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        endpoint = Endpoint("reward server", url, timeout=LIMIT, tries=1)
        said = refusal(RewardError, lambda: ServerReward("server", endpoint).score(asked()))
        endpoint.close()
    assert "cannot be reached (" in said and said.endswith("(1 try).")


@pytest.mark.parametrize("value", [None, ""], ids=["not set", "empty"])
def test_a_token_that_is_not_there(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("NO_TOKEN", value)
    said = refusal(RewardError, lambda: Endpoint("judge", "http://127.0.0.1:1/", token_env="NO_TOKEN"))
    assert said == 'reward.token_env = "NO_TOKEN": no such environment variable. Set it to the token.'


def verdict(content):
    return says({"choices": [{"message": {"content": content}}]})


NO_CONTENT = "judge SERVER answered without choices[0].message.content."
VERDICTS = {
    "an error": (says({"error": {"message": "no such model"}}), "judge SERVER answered with an error: no such model"),
    "no choices": (says({"choices": []}), NO_CONTENT),
    "null for choices": (says({"choices": None}), NO_CONTENT),
    "null for a message": (says({"choices": [{"message": None}]}), NO_CONTENT),
    "a list": (says([1]), NO_CONTENT),
    "nothing said": (verdict(None), "judge SERVER answered with null for choices[0].message.content, not a text."),
    "no verdict": (verdict("It is fine."), "none of 3 responses has a score from judge"),
    "a number too large": (verdict("Score: " + "9" * 400), "none of 3 responses has a score from judge"),
}


@pytest.mark.parametrize(("answer", "sentence"), VERDICTS.values(), ids=VERDICTS)
def test_what_a_judge_answers(tmp_path, answer, sentence):
    def judge(endpoint):
        return JudgeReward("judge", endpoint, "m", "score", None, tmp_path / "cache.jsonl")

    assert sentence in readable(said_of(answer, made=judge, what="judge"))
