"""An algorithm in a few words: the types of its parts, and their settings that differ from the
defaults."""

import dataclasses
from typing import Any

from quartet.algorithms.algorithm import Algorithm

MAIN = ("advantage", "policy_loss", "kl", "aggregation")
OTHERS = (
    "normalize",
    "scores",
    "rewards",
    "value_loss",
    "entropy",
    "positives",
    "ptx",
    "groups",
    "correction",
    "update",
)


def in_short(part: Any) -> str:
    """Return a part's type and the settings that differ from its defaults: "clip high 0.28"."""
    default = type(part)()
    words = [part.type]
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name != "type" and value != getattr(default, field.name):
            words.append(
                f"{field.name} {in_short(value) if dataclasses.is_dataclass(value) else value}"
            )
    return " ".join(words)


def main_parts(algorithm: Algorithm) -> list[str]:
    return [in_short(getattr(algorithm, name)) for name in MAIN]


def other_parts(algorithm: Algorithm) -> list[str]:
    """Return the parts beside the main four that have an effect."""
    words = []
    defaults = {field.name: field.default for field in dataclasses.fields(Algorithm)}
    for name in OTHERS:
        value = getattr(algorithm, name)
        for part in value if isinstance(value, tuple) else (value,):
            idle = part.type in {"none", "all", "first_order"} or part == defaults[name]
            if not idle and getattr(part, "coef", 1) != 0:
                words.append(f"{name} {in_short(part)}")
    return words


def in_words(algorithm: Algorithm) -> str:
    """Return all parts on one line: "advantage gae · policy_loss clip · …"."""
    main = [f"{name} {words}" for name, words in zip(MAIN, main_parts(algorithm), strict=True)]
    return " · ".join([*main, *other_parts(algorithm)])
