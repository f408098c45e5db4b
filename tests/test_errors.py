"""Every exception of the package has one base class."""

import importlib
import linecache
import pkgutil

import pytest

import quartet
from quartet.errors import NonFinite, QuartetError

OPTIONAL = {"quartet.launch.on_ray"}
"""Modules that import a package which is not always installed."""
INTERNAL = {"quartet.rewards.worker.NotScores"}
"""Of a process that imports nothing of Quartet; what calls it raises a RewardError instead."""


def exception_classes() -> dict[str, type[Exception]]:
    classes: dict[str, type[Exception]] = {}
    for module in pkgutil.walk_packages(quartet.__path__, "quartet."):
        if module.name.endswith("__main__"):
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ImportError:
            assert module.name in OPTIONAL, module.name
            continue
        for member in members:
            own = getattr(member, "__module__", "").startswith("quartet.")
            if own and isinstance(member, type) and issubclass(member, Exception):
                classes[f"{member.__module__}.{member.__qualname__}"] = member
    return classes


def test_every_exception_class_derives_from_quartet_error():
    classes = exception_classes()
    assert len(classes) > 20 and "quartet.config.toml.ConfigError" in classes
    others = {name for name, kind in classes.items() if not issubclass(kind, QuartetError)}
    assert others == INTERNAL


def test_no_two_exception_classes_have_one_name():
    names = [name.rpartition(".")[2] for name in exception_classes()]
    assert sorted(names) == sorted(set(names))


def test_a_number_that_is_not_finite_is_also_a_runtime_error():
    error = NonFinite("the loss", "7", (1, 2))
    assert isinstance(error, RuntimeError) and isinstance(error, quartet.QuartetError)
    assert str(error) == "the loss is not finite in sample 7; no weight was changed by it"
    assert (error.sample, error.tokens) == ("7", [1, 2])


def shown_in_a_notebook(cell: str) -> list[str]:
    """The lines that IPython shows of the error that a cell ends with."""
    name = "<ipython-input-1-0123456789ab>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
    with pytest.raises(QuartetError) as raised:
        exec(compile(cell, name, "exec"), {})
    kept, lines = True, []
    for line in raised.value._render_traceback_():
        # Frames of the tests are "the reader's own", too.
        kept = "tests" not in line if line.startswith("  File ") else kept or line[0] != " "
        lines += [line] * kept
    return lines


def test_a_notebook_shows_the_cell_and_the_sentence_alone():
    lines = shown_in_a_notebook(
        "import quartet\ndef go():\n    quartet.train('sft', optim={'lr': 'fast'})\ngo()\n"
    )
    lines = [line for line in lines if set(line.strip()) - set("^~")]
    assert lines == [
        '  File "<ipython-input-1-0123456789ab>", line 4, in <module>',
        "    go()",
        '  File "<ipython-input-1-0123456789ab>", line 3, in go',
        "    quartet.train('sft', optim={'lr': 'fast'})",
        'quartet.config.toml.ConfigError: quartet.train: optim.lr = "fast": must be a number.',
    ]


def test_an_exception_in_the_readers_own_code_is_shown_before_what_it_caused():
    lines = shown_in_a_notebook(
        "from quartet.rewards.protocol import RewardError\n"
        "def score():\n"
        "    return 1 / 0\n"
        "try:\n"
        "    score()\n"
        "except ZeroDivisionError as error:\n"
        "    raise RewardError('reward failed') from error\n"
    )
    text = "\n".join(lines)
    first, second = text.index("line 3, in score"), text.index("line 7, in <module>")
    assert first < text.index("ZeroDivisionError: division by zero") < second
    assert lines[-1].endswith("RewardError: reward failed")
