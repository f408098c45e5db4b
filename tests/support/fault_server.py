"""A server whose answers are wrong, partial, slow, hostile or absent, and the table of such faults.

A fault is made from the good answer of the source that is tested: `FAULTS[name](good)` returns a function that talks over the
connection once the request has been read.
"""

import functools
import gzip
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

Answer = Callable[[socket.socket, threading.Event], None]
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
MAX_BYTES = 100_000
"""What the endpoints under test read of an answer."""


@dataclass
class FaultServer:
    """Reads a request on each connection, then lets `answer` write what it likes. Requests whose path ends in one of `healthy`
    are answered with an empty object; with a list of answers, each request is given the next, the last for ever; `choose` finds
    the answer by the body of the request."""

    answer: Answer | list[Answer] | None = None
    healthy: tuple[str, ...] = ()
    choose: Callable[[bytes], Answer] | None = None
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Path, headers and body of each."""

    def __enter__(self):
        self.ended, self.threads, self.lock = threading.Event(), [], threading.Lock()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.listening.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
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
            except OSError:
                return
            self._start(self._talk, connection)

    def _talk(self, connection):
        with connection:
            try:
                connection.settimeout(1.0)
                path, head, body = read_request(connection)
                if path.partition("?")[0].endswith(self.healthy or ("\0",)):
                    answers(200, b"{}", "connection: close")(connection, self.ended)
                    return
                with self.lock:
                    self.requests.append((path, head, body))
                    answer = self._next(body)
                answer(connection, self.ended)
            except OSError:
                pass  # the client has gone

    def _next(self, body):
        if self.choose is not None:
            return self.choose(body)
        if callable(self.answer):
            return self.answer
        return self.answer.pop(0) if len(self.answer) > 1 else self.answer[0]


def read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += (piece := connection.recv(65536))
        if not piece:
            raise ConnectionError
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        body += (piece := connection.recv(65536))
        if not piece:
            raise ConnectionError
    return head.split()[1].decode(), head.decode("latin-1"), body


def raw(data):
    return lambda connection, ended: connection.sendall(data)


def answers(status, body=b"", *headers):
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


def says(table):
    return answers(200, json.dumps(table).encode())


def repeats(piece, pause, begin=b"HTTP/1.1 200 OK\r\n"):
    """The same piece again and again, without end."""

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


def slowly(data, pause):
    def answer(connection, ended):
        for at in range(0, len(data), 40):
            connection.sendall(data[at : at + 40])
            time.sleep(pause)

    return answer


def whole(body, *headers):
    return (
        "\r\n".join(["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers]).encode()
        + b"\r\n\r\n"
        + body
    )


def text(table):
    return json.dumps(table).encode()


def chunked(body, end=b"0\r\n\r\n"):
    return CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + end


@functools.cache
def bomb(layers):
    """20 MB of spaces in gzip: 20 kB after one layer, some hundred bytes after two."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(pack.compress(b" " * 1_000_000) for _ in range(20)) + pack.flush()
    for _ in range(layers - 1):
        data = gzip.compress(data)
    return data


LOST, LATE, NO_JSON = (
    r"cannot be reached \(",
    r"did not answer in ",
    r"answered with something that is not JSON: ",
)
"""What is said of faults that no answer is read from."""

FAULTS: dict[str, tuple[Callable[[dict], Answer], str]] = {
    "a reset": (lambda good: reset, LOST),
    "a closed connection": (lambda good: raw(b""), LOST),
    "half a status line": (lambda good: raw(b"HTTP/1."), LOST),
    "half a header": (lambda good: raw(b"HTTP/1.1 200 OK\r\ncontent-le"), LOST),
    "half a body": (lambda good: raw(whole(text(good))[:-3]), LOST),
    "a chunked body cut short": (lambda good: raw(chunked(text(good), end=b"")), LOST),
    "a chunk of no length": (lambda good: raw(CHUNKED + b"zz\r\n{}\r\n"), LOST),
    "a chunk below zero": (lambda good: raw(CHUNKED + b"-1\r\n{}\r\n"), LOST),
    "a length below zero": (lambda good: answers(200, b"{}", "content-length: -3"), LOST),
    "two lengths": (lambda good: answers(200, text(good), "content-length: 3"), LOST),
    "another protocol": (lambda good: raw(b"SSH-2.0-OpenSSH_9.0\r\n"), LOST),
    "binary": (lambda good: raw(bytes(range(256)) * 4), LOST),
    "a header without a colon": (lambda good: answers(200, text(good), "nonsense"), LOST),
    "a null byte in a header": (lambda good: answers(200, text(good), "x-a: a\0b"), LOST),
    "headers without end": (lambda good: repeats(b"x-a: b\r\n" * 100, 0), LOST),
    "a header of 200 KB": (lambda good: answers(200, text(good), "x-a: " + "b" * 200_000), LOST),
    "a location that is none": (lambda good: answers(302, b"", "location: http://[::1"), LOST),
    "silence": (lambda good: silent, LATE),
    "headers that drip": (lambda good: repeats(b"x", 0.03), LATE),
    "a body that drips": (lambda good: repeats(b" ", 0.03, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"), LATE),
    "chunks that drip": (lambda good: repeats(b"1\r\n \r\n", 0.03, CHUNKED), LATE),
    "continue, without end": (lambda good: repeats(b"HTTP/1.1 100 Continue\r\n\r\n", 0.03, b""), LATE),
    "less than a terabyte": (lambda good: repeats(b" ", 0.03, b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n"), LATE),
    "201": (lambda good: answers(201, b"made"), "answered 201: made"),
    "204": (lambda good: answers(204), r"answered 204: \(nothing\)"),
    "302 to another host": (lambda good: answers(302, b"", "location: http://169.254.169.254/"), "answered 302"),
    "307 to a file": (lambda good: answers(307, b"", "location: file:///etc/passwd"), "answered 307"),
    "401": (lambda good: answers(401), "answered 401"),
    "404": (lambda good: answers(404, b"no such page"), "answered 404: no such page"),
    "408": (lambda good: answers(408), "answered 408"),
    "413": (lambda good: answers(413, b"too long"), "answered 413: too long"),
    "429": (lambda good: answers(429, b"slow down"), "answered 429"),
    "500 with a page": (lambda good: answers(500, b"<html><h1>boom</h1>", "content-type: text/html"), "answered 500"),
    "503 with scores": (lambda good: answers(503, text(good)), "answered 503"),
    "escape sequences": (lambda good: answers(404, b"\x1b[2J\x1b]0;owned\x07\r\nok"), r"answered 404: \\x1b\[2J\\x1b\]0;owned\\x07 ok"),
    "a long complaint": (lambda good: answers(400, b"y" * 50_000), "answered 400: y{200,300} …"),
    "a page": (lambda good: answers(200, b"<html>log in</html>"), NO_JSON + "<html>log in</html>"),
    "nothing": (lambda good: answers(200), NO_JSON + r"\(nothing\)"),
    "half of JSON": (lambda good: answers(200, text(good)[:-3]), NO_JSON),
    "a length that cuts": (lambda good: raw(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n" + text(good)), NO_JSON),
    "JSON twice": (lambda good: answers(200, text(good) * 2), NO_JSON),
    "invalid UTF-8": (lambda good: answers(200, text(good | {"x": "?"}).replace(b"?", b"\xff\xfe")), NO_JSON),
    "a surrogate in UTF-8": (lambda good: answers(200, text(good | {"x": "?"}).replace(b"?", b"\xed\xa0\x80")), NO_JSON),
    "UTF-16": (lambda good: answers(200, json.dumps(good).encode("utf-16")), NO_JSON),
    "brackets without end": (lambda good: answers(200, b"[" * 50_000), NO_JSON + r"\[\["),
    "nested 200 deep": (lambda good: answers(200, text(good | {"x": nested(200)})), NO_JSON),
    "nested 10,000 deep": (lambda good: answers(200, text(good)[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), NO_JSON),
    "too many bytes": (lambda good: answers(200, b" " * (MAX_BYTES + 1)), "answered with more than"),
    "chunks without end": (lambda good: repeats(b"1000\r\n" + b" " * 4096 + b"\r\n", 0, CHUNKED), "answered with more than"),
    "gzip": (lambda good: answers(200, gzip.compress(text(good)), "content-encoding: gzip"), "in the encoding gzip, which was not asked for"),
    "a gzip bomb": (lambda good: answers(200, bomb(1), "content-encoding: gzip"), "in the encoding gzip, which"),
    "a double gzip bomb": (lambda good: answers(200, bomb(2), "content-encoding: gzip, gzip"), "in the encoding gzip, gzip, which"),
    "deflate": (lambda good: answers(200, zlib.compress(text(good)), "content-encoding: deflate"), "in the encoding deflate, which"),
    "an unknown encoding": (lambda good: answers(200, text(good), "content-encoding: rot13"), "in the encoding rot13, which"),
    "a null": (lambda good: says(None), "no object|without"),
    "a number": (lambda good: says(1), "no object|without"),
    "a text": (lambda good: says("ok"), "no object|without"),
    "a list": (lambda good: says([good]), "no object|without"),
    "an empty object": (lambda good: says({}), "without|form"),
    "NaN": (lambda good: answers(200, b"NaN"), "no object|without"),
    "an error beside the answer": (lambda good: says(good | {"error": "out of memory"}), "error: out of memory"),
    "an error of OpenAI's form": (lambda good: says(good | {"error": {"message": "no such model", "code": 5}}), "error: no such model"),
    "a number as error": (lambda good: says(good | {"error": 507}), "error: 507"),
}  # fmt: skip
"""What each is made of, and a pattern of the sentence that a person reads."""


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


HARMLESS: dict[str, Callable[[dict], Answer | list[Answer]]] = {
    "as it should be": says,
    "labelled text/html": lambda good: answers(200, text(good), "content-type: text/html; charset=zzz"),
    "with a byte order mark": lambda good: answers(200, b"\xef\xbb\xbf" + text(good)),
    "with cookies": lambda good: answers(200, text(good), "set-cookie: a=b; path=/", "set-cookie: \xff=; expires=never"),
    "in chunks": lambda good: raw(chunked(text(good))),
    "without a length": lambda good: raw(b"HTTP/1.0 200 OK\r\n\r\n" + text(good)),
    "piece by piece": lambda good: slowly(whole(text(good)), 0.005),
    "after a continue": lambda good: raw(b"HTTP/1.1 100 Continue\r\n\r\n" + whole(text(good))),
    "in the encoding identity": lambda good: answers(200, text(good), "content-encoding: identity"),
    "with half a surrogate pair beside it": lambda good: says(good | {"x\ud800": ["\udfff"]}),
    "with a number of 5,000 digits beside it": lambda good: answers(200, text(good)[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
    "with NaN and infinity beside it": lambda good: answers(200, text(good)[:-1] + b', "x": [NaN, -Infinity, 1e309]}'),
    "with no error": lambda good: says(good | {"error": None}),
    "after a reset": lambda good: [reset, says(good)],
    "after half a body": lambda good: [raw(whole(text(good))[:-3]), says(good)],
    "after a 503": lambda good: [answers(503), says(good)],
    "after a 429 that says when": lambda good: [answers(429, b"", "retry-after: 0"), says(good)],
    "after a 429 that names a date": lambda good: [answers(429, b"", "retry-after: Wed, 21 Oct 2099 07:28:00 GMT"), says(good)],
}  # fmt: skip
"""Answers that are read all the same."""
