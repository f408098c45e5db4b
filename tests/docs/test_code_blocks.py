"""Every block of code in the README and the docs: commands exist with their options, TOML is TOML,
and Python is run by a test, or marked."""

import ast
import functools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN_BY = {
    "README.md": "its names are those of api.md: `quartet.train` with other values",
    "critic.md": "tests/cli/test_critic.py",
    "conformance.md": "tests/conformance/test_docs_page.py",
    "api.md": "tests/test_parts.py",
    "extending.md": "tests/test_extending.py",
    "from_python.md": "tests/docs/test_start.py",
    "sweeps.md": "tests/api/test_sweep.py",
}
"""What runs the Python blocks of a page. A block of another page is marked with <!-- not run -->."""
BLOCK = re.compile(r"(<!-- not run[^>]*-->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:    )?(?:\$ )?quartet ([a-z]\w*)(?: (.*))?$", re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


@functools.cache
def options():
    """The options of each command."""
    import typer

    from quartet.cli import app

    commands = typer.main.get_command(app).commands
    return {
        name: {word for p in command.params for word in [*p.opts, *p.secondary_opts]}
        | {"--help", "--debug"}
        for name, command in commands.items()
    }


def commands_of(text):
    """Yield the verb and the words of each command line in indented and fenced blocks."""
    for verb, rest in COMMAND.findall(text):
        words = re.split(r"\s#|\s{2,}| (?:&&|\||>) ", rest)[0]
        try:
            yield verb, shlex.split(words)
        except ValueError:
            yield verb, words.split()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    for verb, words in commands_of(page.read_text(encoding="utf-8")):
        if verb not in options() and not any(word.startswith("-") for word in words):
            continue  # a line of output, such as `quartet 0.2.0 · …`
        assert verb in options(), f"quartet {verb}"
        for word in words:
            if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word) and verb in options():
                option = word.partition("=")[0]
                assert option in options()[verb] or "." in word, f"quartet {verb} {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_toml_and_python_can_be_read(page):
    for _, language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "toml":
            tomllib.loads(code)
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_run_by_a_test_or_marked(page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    unmarked = [code for mark, language, code in blocks if language == "python" and not mark]
    assert not unmarked or page.name in RUN_BY, unmarked[0]


def test_the_pages_that_are_run_have_python_and_their_tests_are_there():
    for page, test in RUN_BY.items():
        path = ROOT / page if page == "README.md" else ROOT / "docs" / page
        assert "```python" in path.read_text(encoding="utf-8")
        assert "/" not in test or (ROOT / test).is_file()
