"""Helpers of all commands: the application, the consoles, exit codes and refusals."""

import contextlib
import errno
import inspect
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from quartet import __version__
from quartet.errors import QuartetError
from quartet.io.texts import did_you_mean

FAILED, WRONG_REQUEST, CHECK_FAILED, RESUMABLE, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes. 75 is a temporary failure in sysexits.h: the same command with --resume goes on."""

OTHER_WORDS = {
    "resume": "quartet run RUN --resume goes on with a run.",
    "train": "quartet run trains.",
    "evaluate": "quartet eval evaluates.",
    "test": "quartet eval evaluates.",
    "list": "quartet runs lists runs.",
    "ls": "quartet runs lists runs.",
    "help": "quartet --help lists the commands.",
    "version": "quartet --version prints the version.",
}
"""What does that for which other programs have a command of this name."""


ORDER = [
    "run",
    "plan",
    "init",
    "data",
    "reward",
    "studio",
    "runs",
    "inspect",
    "compare",
    "doctor",
    "report",
    "critic",
    "eval",
    "chat",
    "label",
    "export",
    "serve-reward",
    "sweep",
    "replay",
    "explain",
    "algorithms",
    "import",
]
"""The commands as the help lists them: those that a user meets first come first."""


class Commands(TyperGroup):
    """The commands. A call that cannot be understood is refused in one sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:  # typer keeps the line breaks of a docstring
            paragraphs = inspect.cleandoc(command.help).split("\n\n")
            command.help = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_in_a_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_in_a_sentence():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = OTHER_WORDS.get(name) or did_you_mean(name, self.list_commands(ctx)).strip()
            refuse(f"{name}: no such command. {near or OTHER_WORDS['help']}")
        return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _usage_in_a_sentence() -> Iterator[None]:
    """Refuse a call with the sentence of a usage error of typer's that is raised within."""
    try:
        yield
    except Exception as error:
        # Versions of typer have these classes in different modules.
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        refuse(_usage_sentence(error))


def _usage_sentence(error: Any) -> str:
    """Return what is wrong with a call: the command, the option or argument, what to do."""
    names: list[str] = []
    context = error.ctx
    while context is not None and context.parent is not None:
        names, context = [context.info_name, *names], context.parent
    command, parameter = " ".join(["quartet", *names]), getattr(error, "param", None)
    if parameter is None:
        near = getattr(error, "possibilities", None)
        reason = _sentence_of(error.message if near else error.format_message())
        rest = f"Did you mean {' or '.join(near)}?" if near else f"See {command} --help."
        return f"{command}: {reason} {rest}"
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
    if type(error).__name__ == "MissingParameter":
        meaning = (getattr(parameter, "help", None) or "").partition(".")[0]
        what = f": {meaning[0].lower()}{meaning[1:]}" if meaning else ""
        return f"{command}: {name} is missing{what}. See {command} --help."
    return f"{command}: {name}: {_sentence_of(error.message)}"


def _sentence_of(message: str) -> str:
    """Return a message of typer's or pydantic's as the rest of a sentence."""
    words = message.removeprefix("Value error, ").rstrip(".")
    return f"{words[:1].lower()}{words[1:]}."


app = typer.Typer(
    cls=Commands,
    help="RLHF for language models, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Terminal(Console):
    """A console that raises BrokenPipeError instead of exiting: `cli/printing.py` and `main` decide
    what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  rich calls this inside its except block


# Without markup and emoji, text such as [x] and :train: is printed as it is.
console = Terminal(highlight=False, markup=False, emoji=False)
complaints = Terminal(stderr=True, highlight=False, markup=False, emoji=False)

FILE_WIDTH = 200
"""The width, in columns, of what is printed into a file or a pipe."""
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
    """Return whether only this machine can connect to the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposure(host: str) -> tuple[tuple[str, ...], str | None]:
    """Return the hosts that pages served at an address may be asked by, and the token that they
    require: None where only this machine can connect."""
    from quartet.studio.protection import LOOPBACK

    if is_loopback(host):
        return (*LOOPBACK, host), None
    return ("*",), secrets.token_urlsafe(24)


class SettingsCommand(TyperCommand):
    """A command that takes `key=value` words. An option that is a key, or another library's option,
    is refused with how it is written here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest: list[str] = super().parse_args(ctx, list(args))
        except Exception as error:
            option = getattr(error, "option_name", None)
            is_typo = bool(getattr(error, "possibilities", None))
            if not isinstance(option, str) or is_typo:
                raise
            if (sentence := _about_option(option, args)) is None:
                raise
            refuse(sentence)
        return rest


def _about_option(option: str, args: Sequence[str]) -> str | None:
    """Return a sentence about an option that is a setting; None if it is none."""
    from quartet.config.suggestions import known_keys, option_in_words

    name = option.lstrip("-")
    if name in known_keys():
        at = next((i for i, word in enumerate(args) if word.partition("=")[0] == option), 0)
        value = [*args[at : at + 1], ""][0].partition("=")[2] or [*args[at + 1 :], "…"][0]
        return f"{option}: settings are written without dashes: {name}={value}"
    meant = option_in_words(name)
    return meant and f"{option}: no such option. {meant} Settings are written key=value."


def refuse(sentence: str) -> NoReturn:
    """Print why a request is refused, and exit with code 2."""
    complaints.print(sentence, style="red", soft_wrap=True)
    raise typer.Exit(WRONG_REQUEST)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Refuse the request with the message of any QuartetError that is raised within."""
    try:
        yield
    except QuartetError as error:
        refuse(str(error))


def columns_of(words: Sequence[str] | None) -> dict[str, str]:
    """Return the columns of the file by Quartet's names, from words such as prompt=question."""
    mapping = {}
    for word in words or []:
        ours, equals, theirs = word.partition("=")
        if not equals:
            refuse(f'--columns "{word}": write ours=theirs, such as prompt=question.')
        mapping[ours] = theirs
    return mapping


def print_json(value: Any) -> None:
    """Print a value as indented JSON, in ASCII if the console cannot encode its characters."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (AttributeError, LookupError, UnicodeEncodeError):
        text = json.dumps(value, indent=2)
    print(text)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address, for uvicorn to listen on. Refuses the request
    if it cannot be bound."""
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
    """Return the URL of a listening socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"
