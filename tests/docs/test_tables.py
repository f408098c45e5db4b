"""Pages with tables that are written by hand name what the code has, and nothing else."""

import ast
import re
from pathlib import Path

from quartet.runs.rules import INVARIANTS, RULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def section(page, heading):
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.partition(f"{heading}\n")[2].partition("\n## ")[0]


def rows(text):
    """The first cells of the tables in a text, and the other cells."""
    lines = re.findall(r"^\| (.*?) \|(.*)\|$", text, re.MULTILINE)
    return [(first, rest) for first, rest in lines if "`" in first]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_of_the_doctor_has_every_rule_and_its_invariants():
    text = (DOCS / "doctor.md").read_text(encoding="utf-8").partition("\n## ")[0]
    found = [name for first, _ in rows(text) for name in names(first)]
    assert sorted(found) == sorted(rule.__name__ for rule in RULES)
    stopping = {name for first, _ in rows(text) for name in names(first) if "■" in first}
    assert stopping == INVARIANTS
    assert all(len(rest) > 20 for _, rest in rows(text))


def event_kinds():
    """The kinds of the events that the code writes: `folder.event(kind, …)`."""
    kinds = set()
    for path in (ROOT / "src" / "quartet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_event = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_event and node.func.attr == "event" and node.args:
                kind = node.args[0]
                options = [kind.body, kind.orelse] if isinstance(kind, ast.IfExp) else [kind]
                kinds |= {option.value for option in options if isinstance(option, ast.Constant)}
    return kinds


def test_the_page_of_formats_has_every_event_with_its_keys(ppo_run):
    table = {
        names(first)[0]: names(rest)
        for first, rest in rows(section("file_formats.md", "## Events"))
    }
    assert set(table) == event_kinds()
    for event in ppo_run.events:
        keys = set(event) - {"time", "event", "stage", "step"}
        assert keys <= set(table[event["event"]]), event["event"]


def test_the_page_of_formats_has_every_file_of_a_run(ppo_run):
    table = rows(section("file_formats.md", "## What a run writes"))
    written = {path for first, _ in table for path in names(first)}
    top = {path.partition("/")[0] for path in written}
    assert {path.name for path in ppo_run.path.iterdir()} <= top
    inner = {p.name for p in (ppo_run.path / "evaluation").iterdir() if p.suffix != ".json"}
    assert {f"evaluation/{name}" for name in inner} <= written
    source = "".join(p.read_text("utf-8") for p in (ROOT / "src" / "quartet").rglob("*.py"))
    for name in top - {"reward_model-1", "round-1", "round-2"}:
        assert f'"{name}"' in source, name


def test_the_studios_page_has_every_column_of_a_rollout(ppo_run):
    import pyarrow.parquet

    described = set(re.findall(r"[\w/]+", section("studio.md", "## The run folder")))
    for file in sorted((ppo_run.path / "rollouts").glob("*.parquet"))[:1]:
        for column in pyarrow.parquet.read_schema(file).names:
            assert column.partition("/")[0] in described, column
