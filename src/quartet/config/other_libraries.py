"""What options of other libraries are called here, for people who write the names that they know.

The table is `other_libraries.toml`; it is read when a config has a key that Quartet does not know.
"""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Equivalent:
    """What an option of another library is here."""

    keys: tuple[str, ...]
    """The keys that mean the same, one for each kind of stage; empty if there is none."""
    note: str = ""
    """What else there is to know; where there is no key, why not."""


@functools.cache
def by_library() -> Mapping[str, Mapping[str, Equivalent]]:
    """Return the answers by library and by the option's name. A name that libraries share is under
    the first only."""
    libraries: dict[str, dict[str, Equivalent]] = {}
    for library, section in tomllib.loads(TABLE.read_text(encoding="utf-8")).items():
        libraries[library] = {}
        for name, value in section.items():
            entry = value if isinstance(value, dict) else {"key": value}
            keys = entry.get("key", [])
            keys = [keys] if isinstance(keys, str) else keys
            libraries[library][name] = Equivalent(tuple(keys), entry.get("note", ""))
    return libraries


@functools.cache
def answers() -> Mapping[str, Equivalent]:
    """Return the answers by the option's name. A name can have tables before it, which tell it from
    another library's option of the same name."""
    options: dict[str, Equivalent] = {}
    for library in by_library().values():
        options = {**library, **options}
    return options


def answer_to(key: str) -> Equivalent | None:
    """Return the answer to a dotted key, None if no library has such an option.

    The longest ending of the key that is in the table counts: of `actor_rollout_ref.rollout.n` it
    is `rollout.n`.
    """
    names = key.split(".")
    endings = (".".join(names[start:]) for start in range(len(names)))
    return next((answers()[ending] for ending in endings if ending in answers()), None)
