"""A seeded mutator over a whole run folder: whatever it changes, no reader fails, and the other run is listed."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.malformed.reading_runs import Readers

CASES = 10
"""In each of the seeds of the default suite."""
LONG = 800
VALUES = (
    None,
    True,
    -1,
    0,
    10**30,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    "x",
    "\x1b[2J",
    "\ud800",
    "1" * 5000,
    [],
    {},
)
VALUES += ([[]], {"a": {}}, [1, "a"], "<script>", 2**63, -(2**31), "²²")


@pytest.fixture(scope="module")
def readers(ppo_run, tmp_path_factory):
    return Readers(ppo_run.path, tmp_path_factory.mktemp("fuzzed"))


READ_ON = {
    "events.jsonl": ("", "doctor"),
    "config.resolved.toml": ("config", "doctor"),
    "env.json": ("config",),
    "evaluation": ("frontier", "answers", "reward-model"),
    "rollouts": ("samples?step=1", "tokens?step=1&sample=0", "samples"),
    "probes": ("samples?kind=probes", "tokens?kind=probes&step=0&sample=0"),
}
"""The pages that show a file or what is in a folder."""


def mutate(run: Path, rng: random.Random) -> tuple[str, str]:
    """Change one file of the run; return which, and what was done."""
    path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    kinds: list[Callable[[Path, random.Random], None]] = [flip_bits, cut, swap, double, empty]
    kinds += {
        ".jsonl": [json_lines] * 6,
        ".json": [json_file] * 6,
        ".toml": [toml_value] * 6,
        ".parquet": [parquet_column] * 6,
    }[path.suffix]
    kind = rng.choice(kinds)
    kind(path, rng)
    return str(path.relative_to(run)), kind.__name__


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 64))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def swap(path: Path, rng: random.Random) -> None:
    """Two pieces of the file change places."""
    content = path.read_bytes()
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    path.write_bytes(content[:a] + content[b:c] + content[a:b] + content[c:])


def double(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + content[max(0, at - rng.randrange(1, 200)) :])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice((b"", b"\n", b"\0" * 4096, b"null", b"[]", b"{}", b"\xff")))


def change_value(value: Any, rng: random.Random) -> None:
    """One entry of a JSON value, anywhere in it, becomes another, vanishes or is renamed."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    if not places:
        return
    holder, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\x1b[2J", "step", "score/x", "p" * 1000, "reward"))] = (
            holder.pop(key)
        )
    else:
        holder[key] = rng.choice(VALUES)


def json_lines(path: Path, rng: random.Random) -> None:
    lines: list[Any] = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # of an earlier change
            lines.append(json.loads(line))
    for _ in range(rng.choice((1, 1, 5))):
        if lines and isinstance(chosen := rng.choice(lines), dict | list):
            change_value(chosen, rng)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def json_file(path: Path, rng: random.Random) -> None:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # by an earlier change
        return
    if isinstance(value, dict | list):
        change_value(value, rng)
    path.write_text(json.dumps(value))


def toml_value(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    at = [i for i, line in enumerate(lines) if "=" in line] or [0]
    for _ in range(rng.choice((1, 3))):
        i = rng.choice(at)
        if i < len(lines):
            values = (
                "3",
                "-1",
                "1.5",
                "nan",
                "inf",
                '"x"',
                '"\\u001b[2J"',
                "[]",
                "[1]",
                "{ a = 1 }",
                "true",
                "0xffffffffffffffffffff",
                "1979-05-27",
            )
            lines[i] = f"{lines[i].partition('=')[0]}= {rng.choice(values)}"
    path.write_text("\n".join(lines), encoding="utf-8")


def parquet_column(path: Path, rng: random.Random) -> None:
    """A column is lost, of another type, empty, or of other values."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError):  # by an earlier change
        return
    name, n = rng.choice(table.column_names), table.num_rows
    place = table.column_names.index(name)
    others = [
        None,
        pa.nulls(n),
        pa.array(["x"] * n),
        pa.array([-1] * n),
        pa.array([float("nan")] * n),
        pa.array([1e308, -1e308] * n)[:n],
        pa.array([True] * n),
        pa.array([[1]] * n),
        pa.array([{"a": 1}] * n),
        pa.array([b"\xff"] * n),
        pa.array([2**62] * n),
        pa.array([None, 1] * n)[:n],
    ]
    chosen = rng.choice(others)
    table = table.remove_column(place)
    if chosen is not None:
        table = table.add_column(place, name, chosen)
    pq.write_table(table, path)


def survive(readers: Readers, rng: random.Random, everything: bool) -> None:
    victim = readers.restore()
    done = [mutate(victim, rng) for _ in range(rng.choice((1, 1, 1, 3)))]
    try:
        readers.listed()
        readers.methods(figures=everything)
        if everything:
            for read in (readers.pages, readers.data, readers.comparison, readers.verbs):
                read()
        else:
            readers.pages(
                {page: None for file, _ in done for page in READ_ON[file.partition("/")[0]]}
            )
            readers.data()
    except BaseException as error:
        raise AssertionError(f"did not survive {done}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
def test_readers_survive_changed_files(readers, seed):
    rng = random.Random(seed)
    for _ in range(CASES):
        survive(readers, rng, everything=False)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 104))
def test_readers_survive_very_many_changed_files(readers, seed):
    rng = random.Random(seed)
    for _ in range(LONG // 4):
        survive(readers, rng, everything=True)
