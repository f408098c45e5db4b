"""The generated pages of the documentation site: a hook of mkdocs (`hooks` in mkdocs.yml).

The README, CONTRIBUTING, SECURITY and CHANGELOG become pages, with their links set right; the
reference is generated from the package: settings, commands, public names, options of other
libraries. Nothing is written into docs/. Imports no torch.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.config.explain import headlines, inside, meaning_of, types_of
from quartet.config.other_libraries import by_library
from quartet.config.suggestions import known_keys

ROOT = Path(__file__).parents[1]
FILES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
}
"""Files of the repository that are pages of the site."""
ELSEWHERE = {"Field": "pydantic's `Field`: the default, range and description of a part's field."}
"""Public names that are defined in another package."""
SHIM = re.compile(r'<script src="https://[^"]*iframe-worker[^"]*"></script>')
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    pages = {page: from_repository(name) for name, page in FILES.items()}
    pages["reference/configuration.md"] = configuration()
    pages["reference/commands.md"] = commands()
    pages["reference/python.md"] = python()
    pages["other_libraries.md"] = other_libraries()
    pages["zh/quartet.md"] = chinese_readme()
    for page, content in pages.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Let the Chinese pages lead to the README as it is called on the site."""
    return (
        markdown.replace("](README.md)", "](quartet.md)")
        if page.url.startswith("zh/")
        else markdown
    )


def on_post_page(output: str, page: Any, config: Any) -> str:  # noqa: ARG001 (mkdocs names them)
    """Put our own script in place of the one that the plugin `offline` loads from another host."""
    up = "../" * page.url.count("/")
    return SHIM.sub(f'<script src="{up}javascripts/worker.js"></script>', output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:  # noqa: ARG001
    """The same for pages without a source, such as 404.html."""
    return SHIM.sub('<script src="javascripts/worker.js"></script>', output_content)


def from_repository(name: str) -> str:
    """Return a file of the repository as a page: links into docs/ are links of the site, and links
    to other files, which are not on the site, are text."""

    def relinked(match: "re.Match[str]") -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        if path == "docs/zh/README.md":
            return f"[{text}](zh/quartet.md)"
        if path.startswith("docs/"):
            return f"{image}[{text}]({target.removeprefix('docs/')})"
        if path in FILES:
            return f"[{text}]({FILES[path]}{'#' if anchor else ''}{anchor})"
        return text

    return LINK.sub(relinked, (ROOT / name).read_text(encoding="utf-8"))


def chinese_readme() -> str:
    """Return the translation of the README, with its links to files that are not on the site as
    text."""
    text = (ROOT / "docs" / "zh" / "README.md").read_text(encoding="utf-8")
    text = text.replace("(../../README.md)", "(../index.md)")
    return re.sub(r"\[([^\]]*)\]\(\.\./\.\./[^)]*\)", r"\1", text)


def configuration() -> str:
    """Return the page of all settings, a heading for each table and each setting."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run's file. `quartet explain optim.lr` prints the same; `key=value` on the "
        "command line wins over the file, the file over the recipe. A table with a `type` has the "
        "keys of that type.",
        "",
        f"{len(known_keys())} keys.",
    ]
    for key in known_keys():
        if "." not in key:
            lines += ["", f"## {key}", ""]
        elif key.endswith(".type"):
            continue
        else:
            lines += ["", f"### `{key}`", ""]
        lines += [*setting(key), ""]
    return "\n".join(lines)


def setting(key: str) -> Iterator[str]:
    """Yield the lines of one setting: what it may be, what it means, the types that it has."""
    if key == "algorithm.preset":
        yield "A preset to start from: [algorithms](../algorithms.md)."
        return
    facts: dict[str, list[str]] = {}
    for line in headlines(key):
        fact, _, kind = line.removeprefix(key).strip().partition("   where type = ")
        facts.setdefault(fact, []).extend([kind] if kind else [])
    for fact, kinds in facts.items():
        where = f", where `type` is {', '.join(f'`{k}`' for k in kinds)}" if kinds else ""
        yield f"*{escaped(fact)}*{where}  "
    if meaning := meaning_of(key):
        yield ""
        yield escaped(" ".join(meaning.split()))
    if types := types_of(key):
        yield ""
        yield "| type | |"
        yield "|---|---|"
        for name, text in types.items():
            yield f"| `{name}` | {cell(text)} |"
    elif "." not in key and inside(key):
        yield ""
        yield " · ".join(f"`{inner.rpartition('.')[2]}`" for inner in inside(key))


def commands() -> str:
    """Return the page of all commands with their arguments and options."""
    import typer

    import quartet.cli  # noqa: F401  registers the commands
    from quartet.cli.common import app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="quartet")
    lines = [
        "# Commands",
        "",
        "Exit codes: 0 done, 1 failed while running, 2 the request is wrong, 3 a check did not "
        "pass. `--json` is there where a program may read the answer, `--debug` prints tracebacks.",
    ]
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        inner = typer.Context(command, info_name=f"quartet {name}", parent=context)
        usage = " ".join(command.collect_usage_pieces(inner))
        lines += ["", f"## {name}", "", f"    quartet {name} {usage}", ""]
        lines += [escaped(" ".join(part.split())) + "\n" for part in help_of(command)]
        lines += ["| | |", "|---|---|"]
        for parameter in command.params:
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "argument":
                names = parameter.metavar or parameter.name.upper()
            default = default_of(parameter)
            lines.append(
                f"| `{names.replace('|', ' or ')}` | {cell(parameter.help or '')}{default} |"
            )
    return "\n".join(lines) + "\n"


def help_of(command: Any) -> list[str]:
    """Return the paragraphs of a command's help."""
    return (command.help or "").replace("\f", "").strip().split("\n\n")


def default_of(parameter: Any) -> str:
    """Return a default that says something, as the end of a cell."""
    value = parameter.default
    said = isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""
    return f" Default: `{value}`." if said and parameter.show_default is not False else ""


def python() -> str:
    """Return the page of all public names, from their docstrings."""
    lines = [
        "# Python API, in full",
        "",
        "Every name of `import quartet`, from its docstring. How they are used is in "
        "[Python API](../api.md).",
    ]
    names = (ROOT / "src" / "quartet" / "__init__.pyi").read_text(encoding="utf-8")
    origins = re.findall(r"^from (\S+) import (\w+) as", names, re.MULTILINE)
    for module, name in sorted(origins, key=lambda pair: pair[1].lower()):
        if name in ELSEWHERE:
            lines += ["", f"## {name}", "", ELSEWHERE[name]]
        else:
            lines += ["", f"::: {module}.{name}"]
    return "\n".join(lines) + "\n"


def other_libraries() -> str:
    """Return the page that maps the options of other libraries to ours."""
    lines = [(ROOT / "scripts" / "other_libraries_head.md").read_text(encoding="utf-8").rstrip()]
    for library, options in by_library().items():
        lines += ["", f"## {library}", "", "| option | here | |", "|---|---|---|"]
        for name, answer in sorted(options.items()):
            keys = ", ".join(
                f"[`{key}`](reference/configuration.md#{slug(key)})" for key in answer.keys
            )
            lines.append(f"| `{name}` | {keys or '—'} | {cell(answer.note)} |")
    return "\n".join(lines) + "\n"


def slug(key: str) -> str:
    """Return the anchor of a setting's heading, as pymdownx.slugs makes it."""
    name = key.removesuffix(".type") if key.endswith(".type") else key
    return re.sub(r"[^\w\- ]", "", name).lower()


def escaped(text: str) -> str:
    """Return text in which Markdown sees no tags and no links."""
    return re.sub(r"([<\[*_`])", r"\\\1", text) if "`" not in text else text.replace("<", "&lt;")


def cell(text: str) -> str:
    """Return text for a table's cell."""
    return escaped(" ".join(text.split())).replace("|", "\\|")
