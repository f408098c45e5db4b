"""What is printed arrives on every console, and a run outlives whatever reads it."""

import errno
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quartet.cli import app
from quartet.cli.common import print_json
from quartet.cli.printing import ERRORS, SIGNS, SafeStream, print_anything
from tests.runtime.test_runs import QUARTET
from tests.support.tiny_run import SMALL, make_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    make_run(root / "runs", "sums", *SMALL, 'recipe=["sft", "grpo"]', "run.steps=1")
    return root


def printed(text: str, encoding: str) -> bytes:
    raw = io.BytesIO()
    stream = SafeStream(raw, encoding=encoding, errors=ERRORS)
    stream.write(text)
    stream.flush()
    return raw.getvalue()


@pytest.mark.parametrize(
    "encoding", ["ascii", "latin-1", "cp437", "cp1252", "utf-8", "utf-16", "shift_jis", "koi8-r"]
)
def test_every_character_can_be_printed_on_every_console(encoding):
    text = "".join(SIGNS) + "é ü 日本 \U0001f600 \ud800 \udc80 \x00 π"
    assert printed(text, encoding)
    assert printed("loss 3.41 → 1.92 ▲ ⟦x⟧", "ascii") == b"loss 3.41 -> 1.92 ! [[x]]"
    assert printed("é\ud800", "ascii") == b"\\xe9\\ud800"


def test_all_signs_that_quartet_prints_have_a_word(tmp_path):
    """Those of the command line, of the live lines and of messages; letters of languages become escapes."""
    sources = [*Path("src/quartet/cli").glob("*.py")]
    if not sources[0].is_file():
        pytest.skip("not in a checkout")
    used = {c for path in sources for c in path.read_text() if not c.isascii() and not c.isalnum()}
    assert used - set(SIGNS) == {"‖"}


VERBS = [
    ["runs"],
    ["inspect"],
    ["inspect", "--step", "1", "--sample", "0"],
    ["doctor", "runs/latest"],
    ["doctor", "runs/latest", "--json"],
    ["compare", "runs/latest", "runs/latest"],
    ["algorithms"],
    ["algorithms", "ppo"],
    ["plan", "sums"],
    ["plan", "sums", "--json"],
    ["run", "--help"],
    ["--help"],
    ["nonsense"],
    ["run", "nowhere.toml"],
    ["data", "rows.jsonl"],
    ["data", "rows.jsonl", "--json"],
]
HARNESS = """
import io, json, os, sys
from quartet import cli
from quartet.cli import common
def one(words, encoding):
    raw = [io.BytesIO(), io.BytesIO()]
    sys.stdout, sys.stderr = (io.TextIOWrapper(r, encoding=encoding) for r in raw)
    sys.argv = ["quartet", *words]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush(); sys.stderr.flush()
    return code, *(r.getvalue().decode(encoding) for r in raw)
verbs, encodings = json.load(sys.stdin)
real = sys.stdout
found = [[words, e, *one(words, e)] for e in encodings for words in verbs]
real.write(json.dumps(found))
real.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_every_verb_prints_in_every_encoding(place):
    """All of them in one process: whatever ends one ends there."""
    (place / "rows.jsonl").write_text('{"prompt": "é → 日本", "completion": "b"}\n' * 4)
    encodings = ["ascii", "latin-1", "cp1252", "utf-8"]
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps([VERBS, encodings]),
        capture_output=True,
        text=True,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(VERBS) * len(encodings)
    codes = {tuple(words): code for words, encoding, code, _, _ in found if encoding == "utf-8"}
    for words, encoding, code, out, err in found:
        assert code == codes[tuple(words)] and "Error" not in err.replace("Error ", ""), (
            words,
            encoding,
            err,
        )
        assert out or err
        if "--json" in words:
            json.loads(out)


def test_json_is_json_on_every_console(monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", SafeStream(raw, encoding=encoding, errors=ERRORS))
        print_json({"text": "→ 😀 \ud800"})
        sys.stdout.flush()
        assert json.loads(raw.getvalue().decode(encoding)) == {"text": "→ 😀 \ud800"}


class Failing(io.RawIOBase):
    """A stream that takes nothing any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_stream_that_fails_is_an_error_for_a_verb_and_none_for_a_run(number):
    failing = Failing(number)
    stream = SafeStream(io.BufferedWriter(failing), encoding="utf-8", errors=ERRORS)
    stream.write("x")
    with pytest.raises(OSError):
        stream.flush()
    stream.outlives_reader = True
    for _ in range(3):
        stream.write("x" * 100_000)
        stream.flush()
    failing.number = 0  # what is left is written where the buffer is closed, which may warn
    stream.detach()


def test_printing_without_any_stream_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    print_anything()
    assert sys.stdout is None


def reader_gone(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command with a pipe for its output that nobody reads, from the first byte on."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            words, stdout=write, stderr=subprocess.PIPE, text=True, cwd=cwd, check=False
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("words", [["runs"], ["plan", "sums", "--json"]])
@pytest.mark.slow
def test_a_closed_pipe_ends_a_verb_quietly(place, words):
    done = reader_gone([QUARTET, *words], place)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_it(tmp_path):
    words = ["run", "sums", *SMALL, "policy.create.max_length=32", 'recipe="sft"', "run.name=x"]
    small = [word for word in words if not word.startswith(("rollout.", "evaluation."))]
    done = reader_gone([QUARTET, *small], tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    [run] = (tmp_path / "runs").glob("*-x")
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "done" and (run / "report.html").is_file()


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("words", [["studio", "runs"], ["serve-reward", "runs/latest"]])
def test_a_port_in_use_is_one_sentence_before_any_address(place, monkeypatch, taken, words):
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, [*words, "--port", str(taken)])
    assert done.exit_code == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"--port {taken}: is in use on 127.0.0.1. Give another with --port, or 0 for any that is free.\n"
    )


def test_an_address_of_another_machine_is_one_sentence(place, monkeypatch):
    monkeypatch.chdir(place)
    done = CliRunner().invoke(
        app, ["studio", "runs", "--host", "127.0.0.1", "--port", "0", "--host", "192.0.2.7"]
    )
    assert done.exit_code == 2 and "--host 192.0.2.7 --port 0: cannot listen there (" in done.stderr


def test_the_address_that_is_printed_is_the_one_that_answers(place, monkeypatch):
    """Also where the system chose the port."""
    import httpx
    import uvicorn

    monkeypatch.chdir(place)
    real, found = uvicorn.Server.run, []

    def run(server, sockets):
        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                return
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            server.should_exit = True

        import threading

        def ask():
            port = sockets[0].getsockname()[1]
            for _ in range(200):
                try:
                    found.append((port, httpx.get(f"http://127.0.0.1:{port}/").status_code))
                    return
                except httpx.TransportError:
                    threading.Event().wait(0.02)

        asking = threading.Thread(target=ask)
        asking.start()
        server.config.app, server.config.loaded = app, False
        server.config.lifespan = "off"
        real(server, sockets)
        asking.join()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    done = CliRunner().invoke(app, ["studio", "runs", "--port", "0"])
    assert done.exit_code == 0, done.output
    assert [status for _, status in found] == [
        204
    ] and f"http://127.0.0.1:{found[0][0]}/" in done.stdout
