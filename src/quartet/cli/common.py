"""What all verbs share: the application, the screen, and how a request is refused."""

import contextlib
import errno
import ipaddress
import json
import socket
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from quartet import __version__
from quartet.errors import QuartetError

FAILED, WRONG_REQUEST, CHECK_FAILED, RESUMABLE, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes; 75 is what sysexits.h calls a temporary failure: the same command again, with
--resume, goes on."""

app = typer.Typer(
    help="RLHF for language models, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Terminal(Console):
    """A console that leaves it to its stream what becomes of it when nobody reads it any more (see
    `cli/printing.py`)."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  rich calls it where the error is handled


console = Terminal(
    highlight=False, markup=False, emoji=False
)  # text is shown as it is: [x] and :train: too
complaints = Terminal(stderr=True, highlight=False, markup=False, emoji=False)

FILE_WIDTH = 200
"""Columns of what goes into a file or a pipe."""
if not console.is_terminal:
    console.width = FILE_WIDTH


@app.callback(invoke_without_command=True)
def quartet(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.print(f"quartet {__version__}")
        raise typer.Exit


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_progress_bars() -> None:
    """Those of transformers, which would stand between our lines."""
    import transformers

    transformers.logging.disable_progress_bar()


def refuse(sentence: str) -> NoReturn:
    complaints.print(sentence, style="red", soft_wrap=True)
    raise typer.Exit(WRONG_REQUEST)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Refuse the request if the package raises an error about it: the error's message is the
    sentence."""
    try:
        yield
    except QuartetError as error:
        refuse(str(error))


def print_json(value: Any) -> None:
    """As readable as the console can print it, and JSON in any case."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (AttributeError, LookupError, UnicodeEncodeError):
        text = json.dumps(value, indent=2)
    print(text)


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to this address, for uvicorn to listen on; or a sentence on why it
    cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            refuse(
                f"--port {port}: is in use on {host}. Give another with --port, or 0 for any that "
                f"is free."
            )
        reason = error.strerror or error
        refuse(
            f"--host {host} --port {port}: cannot listen there ({reason}). Give another with "
            f"--port or --host."
        )
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """The address that a browser takes."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"
