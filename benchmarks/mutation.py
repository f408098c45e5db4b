"""Would the tests notice a wrong formula? Small errors are put into src/quartet/algorithms, one at
a time, and the tests run.

    python benchmarks/mutation.py [--sample 150] [--seed 0] [--timeout 120] [--out mutation.json]
    python benchmarks/mutation.py --again mutation.json --out again.json

With --again, only what was not killed in that result is tried, once more.

A mutant is the source with one expression exchanged: another operator, constant, bound or
dimension, a branch the other way round, a term left out. Text, types, assertions and `raise` are
left alone. It is killed when a test fails, and survives when none does. The libraries are loaded
once; each mutant runs in a fork, which imports Quartet anew with the one file changed and runs the
tests that enter the changed function, quickest first. What is executed at import, such as a
default, is tried with every test. test_closed_form.py trains for minutes and is left out without
`--everything`.
"""

import argparse
import ast
import collections
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[1]
FORMULAS, TESTS = "src/quartet/algorithms", "tests/algorithms"
VERDICTS = ("killed", "timeout", "survived")
OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
}  # fmt: skip
NAMES = {
    "min": "max",
    "minimum": "maximum",
    "amin": "amax",
    "cummin": "cummax",
    "sum": "mean",
    "any": "all",
}
NAMES |= {after: before for before, after in NAMES.items()}
NEGATED = {
    "Float": "-({})",
    "float": "-({})",
    "Int": "-({})",
    "Bool": "~({})",
    "bool": "(not ({}))",
}


@dataclass(frozen=True)
class Mutant:
    """One expression of one file, by its place in the file's bytes, and what stands there
    instead."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str
    inside: str
    """The function around it, "Class.function"; "Class." or "" for what is executed at import."""


def variants(node: Any, returns: str) -> Iterator[tuple[ast.expr, str]]:  # noqa: PLR0912
    """Yield the expressions at this node, each with a replacement. `returns` is the type that the
    function around it returns."""

    def text(original: ast.AST, **changed: Any) -> str:
        fields = {name: getattr(original, name) for name in original._fields} | changed
        return f"({ast.unparse(type(original)(**fields))})"

    match node:
        case ast.Return(value) if value and returns in NEGATED:
            yield value, NEGATED[returns].format(ast.unparse(value))
        case ast.If(test):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.BinOp(left, op, right):
            yield from ((node, text(node, op=other())) for other in OPERATORS.get(type(op), ()))
            if isinstance(op, ast.Add | ast.Sub | ast.BitAnd | ast.BitOr):
                yield node, f"({ast.unparse(left)})"
                yield node, f"({'-' if isinstance(op, ast.Sub) else ''}({ast.unparse(right)}))"
        case ast.BoolOp(op):
            yield node, text(node, op=OPERATORS[type(op)][0]())
        case ast.Compare(_, ops):
            for i, comparison in enumerate(ops):
                yield from (
                    (node, text(node, ops=[*ops[:i], other(), *ops[i + 1 :]]))
                    for other in OPERATORS.get(type(comparison), ())
                )
        case ast.UnaryOp(_, operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield node, str(not value)
        case ast.Constant(int(value) | float(value)):
            yield from (
                (node, repr(other))
                for other in dict.fromkeys((value + 1, 2 * value))
                if other != value
            )
        case ast.IfExp(_, body, other):
            yield node, text(node, body=other, orelse=body)
        case ast.Call(ast.Name(name)) if name in NAMES:
            yield node, text(node, func=ast.Name(NAMES[name]))
        case ast.Call(ast.Attribute(value, name), args, keywords):
            if name in NAMES:
                yield node, text(node, func=ast.Attribute(value, NAMES[name]))
            if name == "where":
                yield node, text(node, args=[args[0], args[2], args[1]])
            if name in {"clamp", "detach"}:
                yield node, f"({ast.unparse(args[0] if ast.unparse(value) == 'torch' else value)})"
            if name == "clamp":
                yield (
                    node,
                    text(
                        node,
                        args=[*args[:-2], *args[:-3:-1]],
                        keywords=[ast.keyword(NAMES[str(k.arg)], k.value) for k in keywords],
                    ),
                )
        case ast.keyword("dim", value):
            yield value, str(int(ast.unparse(value) == "0"))


def places(node: Any, inside: str = "", returns: str = "") -> Iterator[tuple[ast.AST, str, str]]:
    """Yield every node that may change, the function or class around it, and the type that the
    function returns."""
    is_type = (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id[0].isupper()
    )
    if is_type or isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return
    yield node, inside, returns
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list"} or (
            isinstance(node, ast.keyword) and node.arg == "dim"
        ):
            continue  # a dimension is changed with its keyword
        around, type_ = inside, returns
        if name == "body" and isinstance(node, ast.ClassDef):
            around = f"{inside}{node.name}."
        elif name == "body" and isinstance(node, ast.FunctionDef):
            around = inside + node.name if inside.endswith(".") or not inside else inside
            type_ = ast.unparse(node.returns).split("[")[0] if node.returns else ""
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from places(child, around, type_)


def mutants(file: str) -> list[Mutant]:
    """Return all mutants of one file, given by its path from the root of the repository."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    by_place: dict[tuple[int, int, str], Mutant] = {}
    for place, inside, returns in places(ast.parse(source)):
        for node, after in variants(place, returns):
            assert node.end_lineno is not None and node.end_col_offset is not None
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            before = source[start:end].decode()
            by_place.setdefault(
                (start, end, after), Mutant(file, node.lineno, start, end, before, after, inside)
            )
    return list(by_place.values())


def sample(size: int, seed: int) -> list[Mutant]:
    """Return a random sample in which every file has its share, and no file fewer than three."""
    by_file = [mutants(str(p.relative_to(ROOT))) for p in sorted((ROOT / FORMULAS).glob("*.py"))]
    total, chosen = sum(map(len, by_file)), []
    for some in by_file:
        random.Random(seed).shuffle(some)
        chosen += some[: max(3, round(size * len(some) / total))]
    print(f"{len(chosen)} of {total} mutants, drawn with seed {seed}")
    return chosen


class Measure:
    """A pytest plugin: how long each test takes, and which functions of the algorithms it
    enters."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.enters: dict[str, list[str]] = collections.defaultdict(list)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        entered, started = set(), time.perf_counter()
        sys.settrace(lambda frame, *_: entered.add(frame.f_code))
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.perf_counter() - started
            ours = [c for c in entered if c.co_filename.startswith(f"{ROOT}/{FORMULAS}/")]
            self.enters[item.nodeid] = sorted(
                {f"{c.co_filename.removeprefix(f'{ROOT}/')}:{c.co_qualname}" for c in ours}
            )


class Chosen:
    """A pytest plugin: only these tests, in this order; it remembers which one failed."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")


def run_pytest(plugin: object, *options: str) -> int:
    for name in [n for n in sys.modules if n.split(".")[0] in {"quartet", "tests"}]:
        del sys.modules[name]
    fixed = [
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-q",
        "-x",
        "--tb=no",
    ]
    return int(pytest.main([*fixed, *options, TESTS], plugins=[plugin]))


def in_fork(work: Callable[[], Any], timeout: int = 0) -> Any:
    """Return what `work` returns, run in a forked process: None if its time was up, "crash" if it
    died otherwise."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.setitimer(
            signal.ITIMER_PROF, timeout
        )  # of the processor's time: other work may run beside it
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    ended = os.waitpid(pid, 0)[1]
    return json.loads(answer) if answer else None if ended == signal.SIGPROF else "crash"


def measure(*options: str) -> Any:
    plugin = Measure()
    return run_pytest(plugin, *options), plugin.seconds, plugin.enters


def attempt(m: Mutant, tests: list[str], *options: str) -> str:
    """Return the test that notices the mutant, "" if none does."""
    path, loader = ROOT / m.file, importlib.machinery.SourceFileLoader
    plain, source = loader.get_data, path.read_bytes()

    def get_data(self: Any, file: str) -> bytes:
        if Path(file).parent == path.parent / "__pycache__":
            raise OSError("a mutant has no bytecode")
        return (
            source[: m.start] + m.after.encode() + source[m.end :]
            if file == str(path)
            else plain(self, file)
        )

    loader.get_data, loader.set_data = get_data, lambda *_, **__: None  # type: ignore[method-assign,assignment]
    plugin = Chosen(tests)
    return "import" if run_pytest(plugin, *options) and not plugin.failed else plugin.failed


def relevant(m: Mutant, seconds: dict[str, float], enters: dict[str, list[str]]) -> list[str]:
    """Return the tests that can notice a mutant, the quickest first; for a class, those that enter
    it before the others."""
    entering = {
        test: any(f.startswith(f"{m.file}:{m.inside}") for f in enters[test]) for test in seconds
    }
    at_import = m.inside.endswith(".") or not m.inside
    return sorted(
        (t for t in seconds if at_import or entering[t]),
        key=lambda t: (not entering[t], seconds[t]),
    )


def report(results: list[dict[str, Any]]) -> None:
    count = collections.Counter((Path(r["file"]).name, r["verdict"]) for r in results)
    print(f"{'':18}{'mutants':>9}" + "".join(f"{v:>9}" for v in VERDICTS))
    for name in [*dict.fromkeys(file for file, _ in count), "all"]:
        row = [
            sum(n for (file, v), n in count.items() if name in (file, "all") and v == verdict)
            for verdict in VERDICTS
        ]
        print(f"{name:18}{sum(row):9}" + "".join(f"{n:9}" for n in row))
    for r in (r for r in results if r["verdict"] != "killed"):
        print(f"{r['verdict']}  {r['file']}:{r['line']}  {r['before']}  →  {r['after']}")


def examine(
    chosen: list[Mutant], options: Sequence[str], timeout: int, out: Path
) -> list[dict[str, Any]]:
    """Try each mutant, write the results to `out` as they come, and return them. Changes the
    working directory, the import path and hypothesis's profile of this process."""
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    settings.register_profile(
        "mutation", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile("mutation")
    run_pytest(Chosen([]), "--collect-only", *options)  # loads the libraries
    code, seconds, enters = in_fork(lambda: measure(*options))
    if code:
        raise SystemExit("the tests fail without any mutant")
    print(f"{len(seconds)} tests pass in {sum(seconds.values()):.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    for number, mutant in enumerate(chosen, 1):
        started, tests = time.perf_counter(), relevant(mutant, seconds, enters)
        trial = partial(attempt, mutant, tests, *options)
        by = in_fork(trial, timeout) if tests else ""
        verdict = "timeout" if by is None else "killed" if by else "survived"
        results.append(asdict(mutant) | {"verdict": verdict, "by": by, "tests": len(tests)})
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        took = time.perf_counter() - started
        print(
            f"{number:4} {verdict:8} {took:6.1f} s {len(tests):4} tests  "
            f"{mutant.file}:{mutant.line}  {by or ''}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds of processor time for one mutant"
    )
    parser.add_argument("--again", type=Path, help="a result: only what was not killed there")
    parser.add_argument("--everything", action="store_true", help="test_closed_form.py too")
    parser.add_argument("--out", type=Path, default=Path("mutation.json"))
    a = parser.parse_args()
    out = a.out.resolve()
    chosen = sample(a.sample, a.seed)
    if a.again:
        again = [
            r for r in json.loads(a.again.read_text(encoding="utf-8")) if r["verdict"] != "killed"
        ]
        chosen = [Mutant(**{f.name: r[f.name] for f in fields(Mutant)}) for r in again]
        assert all(m in mutants(m.file) for m in chosen), "the sources are not those of the result"
    options = () if a.everything else (f"--ignore={TESTS}/test_closed_form.py",)
    report(examine(chosen, options, a.timeout, out))


if __name__ == "__main__":
    main()
