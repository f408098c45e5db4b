"""Every exception of the package has one base class."""

import importlib
import pkgutil

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
