"""The command `quartet` in processes that are forked from one that has imported everything.

Importing torch and transformers takes a process five to ten seconds, which is most of the time of a tiny run. One process per
test worker imports them, without run-time checks, and forks a child for each command. It is no child of the test process, so that
a test may still say that its process has no children; it ends when its end of the socket is closed.
"""

import functools
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from quartet.cli import NO_BARS

PROJECT = Path(__file__).parents[2]
START = "import os; os.fork() and os._exit(0); os.setsid(); from tests.support.command import serve; serve({})"


def quartet(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, and return its exit code and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request = {"words": words, "cwd": str(cwd), "environment": environment()}
        requests = _server()
        socket.send_fds(requests, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        code = int(requests.recv(16))
        out.seek(0)
        err.seek(0)
        printed, complaints = out.read().decode(), err.read().decode()
    return subprocess.CompletedProcess(["quartet", *words], code, printed, complaints)


def environment() -> dict[str, str]:
    """Return this process's environment without run-time checks."""
    return {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks, once, and return the socket that leads to it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        subprocess.run(
            [sys.executable, "-c", START.format(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment() | {NO_BARS: "1"},  # read when transformers is imported
            cwd=PROJECT,
            check=True,
        )
    return ours


def serve(handle: int) -> None:
    """Fork a child for each request that comes over the socket and answer with its exit code."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    gc.freeze()  # children share the pages of what is imported, and need not go through it
    requests = socket.socket(fileno=handle)
    while True:
        content, handles, _, _ = socket.recv_fds(requests, 1 << 17, 2)
        if not content:
            return
        child = os.fork()
        if not child:
            requests.close()
            _run(json.loads(content), *handles)
        for each in handles:
            os.close(each)
        requests.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _run(request: dict, out: int, err: int) -> None:
    """Be the command: in its folder, with its words, environment and output."""
    from quartet.cli import main

    code: object = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["quartet", *request["words"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
