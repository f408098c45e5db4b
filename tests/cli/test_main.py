"""How the process of a command ends."""

import subprocess
import sys

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from quartet.cli import app
from quartet.cli.common import RESUMABLE

HEAVY = """
import atexit, os, sys
from quartet import cli

class Heavy:
    def __del__(self):
        os.write(1, b"released")

heavy = Heavy()
atexit.register(print, "registered")
def command():
    print("stopped", end=" ")
    sys.exit(CODE)
cli.app = command
cli.main()
"""


def test_the_help_begins_with_what_a_user_meets_first():
    words = CliRunner().invoke(app, ["--help"]).output.split()
    places = [words.index(name) for name in ("run", "plan", "init", "studio", "doctor", "replay")]
    assert places == sorted(places)


def helps(command, name):
    """The texts of a command's help, with what each belongs to."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name}, {parameter.name}", getattr(parameter, "help", None) or ""
    for below, made in getattr(command, "commands", {}).items():
        yield from helps(made, f"{name} {below}")


def test_no_text_in_brackets_is_taken_as_markup():
    """The name of a TOML table, [sweep], was left out of the help of `quartet sweep`."""
    texts = dict(helps(typer.main.get_command(app), "quartet"))
    assert len(texts) > 100
    for name, text in texts.items():
        assert Text.from_markup(text).plain == text.replace("\\[", "["), name


@pytest.mark.parametrize(
    ("code", "said"), [(RESUMABLE, "stopped registered\n"), (0, "stopped registered\nreleased")]
)
def test_a_stopped_run_ends_without_releasing_its_objects_one_by_one(code, said):
    """That takes 6 s for a model of 268 M parameters and a vocabulary of 262,144 tokens."""
    program = HEAVY.replace("CODE", str(code))
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ended.returncode, ended.stdout) == (code, said), ended.stderr
