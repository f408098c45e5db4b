"""What all verbs share: the application, the screen, and how a request is refused."""

import ipaddress
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from quartet import __version__

FAILED, WRONG_REQUEST, CHECK_FAILED, RESUMABLE, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes; 75 is what sysexits.h calls a temporary failure: the same command again, with --resume, goes on."""

app = typer.Typer(
    help="RLHF for language models, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, markup=False, emoji=False)  # text is shown as it is: [x] and :train: too
complaints = Console(stderr=True, highlight=False, markup=False, emoji=False)

FILE_WIDTH = 200
"""Columns of what goes into a file or a pipe."""
if not console.is_terminal:
    console.width = FILE_WIDTH


@app.callback(invoke_without_command=True)
def quartet(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
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
