"""How the process of a command ends."""

import subprocess
import sys

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from quartet.cli import app
from quartet.cli.common import RESUMABLE
from quartet.recipes import recipe_path, sweep_path, template_path

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


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("ppo", "Fill it in, then: quartet plan ppo.toml, quartet run ppo.toml", template_path),
        ("reviews", "Change it, then: quartet plan reviews.toml, quartet run", recipe_path),
        ("epsilon-beta", "then: quartet sweep epsilon-beta.toml --plan, quartet", sweep_path),
    ],
)
def test_init_writes_the_file_of_a_stage_a_recipe_or_a_sweep(
    tmp_path, monkeypatch, name, said, wanted
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", name])
    assert result.exit_code == 0 and f"{name}.toml written. " in result.output
    assert said in " ".join(result.output.split())
    assert (tmp_path / f"{name}.toml").read_text() == wanted(name).read_text()


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


def test_a_paragraph_of_help_breaks_where_the_terminal_ends():
    """typer keeps the line breaks of a docstring, which were then broken once more."""
    group = typer.main.get_command(app)
    for name in group.list_commands(None):
        first, *paragraphs = group.get_command(None, name).help.split("\n\n")
        assert not any("\n" in text for text in [first, *paragraphs]), name


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
