"""Reading untrusted files: opened without following links, parsed within limits, checked entry by
entry.

A run folder may be damaged, or made to harm its reader. All reads of one go through here: `Folder`
opens, `parse_json` and `parse_toml` parse, `checked` removes entries of a wrong type. Each returns
or raises a sentence about what it refused.
"""

import errno
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pydantic_core
from pydantic import ValidationError

from quartet.errors import QuartetError
from quartet.io.texts import excerpt

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_DEPTH = 50
"""The deepest nesting of tables and lists."""
MAX_WHOLE = 1 << 63
"""Larger integers are refused: Arrow and JavaScript cannot hold them."""
MAX_NAMES = 200_000
"""The most entries of a folder that are listed."""
MAX_ENTRIES = 100_000
"""The most entries of all tables and lists in one JSON or TOML value."""
MAX_DOCUMENT = 4 << 20
"""The most bytes of a JSON file."""
MAX_CONFIG = 512 << 10
"""The most bytes of a config."""
SHOWN = 60
"""The most characters of a name in a sentence."""

NO_FOLLOW = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
)
FOLDER = NO_FOLLOW | getattr(os, "O_DIRECTORY", 0)
RELATIVE = os.open in os.supports_dir_fd
KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISLNK, "a link, and links in a run folder are not followed"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
LONG_KEY = re.compile(r"""(?:\.[ \t]*(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*){20}""")
"""A dotted key of twenty parts or more. tomllib needs time quadratic in the number of parts."""


class Unreadable(QuartetError, ValueError):
    """A file cannot be read. The message is a phrase that follows the file's name."""


class Folder:
    """A folder below which files are opened by their relative names; a link on the way is refused,
    not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str) -> IO[bytes] | None:
        """Return the file, open for reading; None where there is none. Unreadable where it is no
        ordinary file, a link, or reached through one. Never waits: not for the writer of a named
        pipe either."""
        *parents, last = name.split("/")
        try:
            with _Place(self.path, parents) as place:
                mode = place.stat(last).st_mode
                if not stat.S_ISREG(mode):
                    raise Unreadable(f"is {_kind(mode)}.")
                handle = place.open(last)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unreadable(f"cannot be opened ({_reason(error)}).") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # exchanged since
            os.close(handle)
            raise Unreadable("is no longer an ordinary file.")
        return os.fdopen(handle, "rb")

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the contents of a file of at most `limit` bytes; None where there is none."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            try:
                content = file.read(limit + 1)
            except OSError as error:
                raise Unreadable(f"cannot be read ({_reason(error)}).") from None
        if len(content) > limit:
            raise Unreadable(
                f"is larger than {limit / 2**20:,.3g} MB, the most that is read of it."
            )
        return content

    def is_plain(self, name: str) -> bool:
        """Whether a folder of this one is there, and it and all in it are no links."""
        try:
            with _Place(self.path, [name]) as place:
                return not any(stat.S_ISLNK(place.stat(entry).st_mode) for entry in place.names())
        except (OSError, Unreadable):
            return False

    def names(self, name: str) -> list[str]:
        """Return the names in a folder of this one; empty where there is none."""
        *parents, last = name.split("/")
        try:
            with _Place(self.path, parents) as place:
                mode = place.stat(last).st_mode
                if not stat.S_ISDIR(mode):
                    raise Unreadable(f"is {_kind(mode)}.")
                place.enter(last)
                return list(place.names())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unreadable(f"cannot be listed ({_reason(error)}).") from None


class _Place:
    """A folder that was reached step by step without following a link. Where the system cannot open
    a file relative to an open folder (Windows), each step is checked with lstat first."""

    def __init__(self, root: Path, parents: Sequence[str]) -> None:
        self.path = root
        self.handle = os.open(root, FOLDER & ~getattr(os, "O_NOFOLLOW", 0)) if RELATIVE else None
        try:
            for name in parents:
                self.enter(name)
        except BaseException:
            self.close()
            raise

    def enter(self, name: str) -> None:
        mode = self.stat(name).st_mode
        if not stat.S_ISDIR(mode):
            raise Unreadable(f"is not read: {shown(name)} is {_kind(mode)}.")
        if self.handle is not None:
            below = os.open(name, FOLDER, dir_fd=self.handle)
            os.close(self.handle)
            self.handle = below
        self.path = self.path / name

    def stat(self, name: str) -> os.stat_result:
        if self.handle is None:
            return (self.path / name).lstat()
        return os.stat(name, dir_fd=self.handle, follow_symlinks=False)

    def open(self, name: str) -> int:
        if self.handle is None:
            return os.open(self.path / name, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_BINARY", 0))
        return os.open(name, os.O_RDONLY | NO_FOLLOW, dir_fd=self.handle)

    def names(self) -> Iterator[str]:
        with os.scandir(self.path if self.handle is None else self.handle) as entries:
            for count, entry in enumerate(entries):
                if count == MAX_NAMES:
                    return
                yield entry.name

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_json(content: bytes) -> tuple[Any, list[str]]:
    """Return the value, and a sentence for each entry that was left out of it. Unreadable where it
    is no JSON."""
    try:
        value = pydantic_core.from_json(content)
    except ValueError as error:
        raise Unreadable(f"is not JSON ({error}).") from None
    return bounded(value)


def parse_toml(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the table, and a sentence for each entry that was left out of it. Unreadable where it
    is no TOML."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 (byte {error.start:,}).") from None
    if LONG_KEY.search(text):
        raise Unreadable("has a key of more than twenty parts.")
    try:
        value, problems = bounded(tomllib.loads(text))
    except RecursionError:
        raise Unreadable("is nested too deeply.") from None
    except ValueError as error:
        raise Unreadable(f"is not TOML ({shown(str(error))}).") from None
    return value, problems


def bounded(value: Any) -> tuple[Any, list[str]]:
    """Return the value without whole numbers of more than 64 bits and without what is nested deeper
    than MAX_DEPTH, and a sentence for each that was left out."""
    problems: list[str] = []
    top = [value]
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(top, ())]
    entries = 0
    while waiting:
        container, path = waiting.pop()
        entries += len(container)
        if entries > MAX_ENTRIES:
            raise Unreadable(f"has more than {MAX_ENTRIES:,} entries.")
        doomed = []
        for key, entry in (
            container.items() if isinstance(container, dict) else enumerate(container)
        ):
            if isinstance(entry, dict | list):
                if len(path) > MAX_DEPTH:
                    doomed.append((key, "is nested too deeply"))
                else:
                    waiting.append((entry, (*path, key)))
            elif isinstance(entry, int) and not -MAX_WHOLE <= entry < MAX_WHOLE:
                doomed.append((key, "is a number of more than 64 bits"))
        for key, why in reversed(doomed):
            problems.append(f"{_joined('', *path[1:], *([key] if path else []))} {why}".strip())
            del container[key]
    if not top:
        raise Unreadable("is a number of more than 64 bits.")
    return value, problems


def checked(adapter: "TypeAdapter[Any]", value: Any) -> tuple[Any, list[str]]:
    """Return the value without the entries that are not of the adapter's types, and a sentence for
    each; None in place of the value where nothing of it is left. What lacks a required entry is
    left out with it."""
    problems: list[str] = []
    while True:
        try:
            adapter.validate_python(value)
            return value, problems
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False, include_context=False)
        places: dict[tuple[Any, ...], str] = {}
        for e in errors:
            loc = tuple(part for part in e["loc"] if part != "[key]")
            sentence = f"{_joined('', *loc)} {_readable(e['type'], e['msg'])}".strip()
            places.setdefault(
                _existing(value, loc[:-1] if e["type"] == "missing" else loc), sentence
            )
        problems += places.values()
        if () in places:
            return None, problems
        for place in sorted(
            places, key=lambda path: [(isinstance(k, int), k) for k in path], reverse=True
        ):
            _remove(value, place)


def _existing(value: Any, path: Sequence[Any]) -> tuple[Any, ...]:
    """Return the longest prefix of the path that exists in the value; pydantic appends type
    names."""
    for i, key in enumerate(path):
        listed = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if listed or (isinstance(value, dict) and key in value):
            value = value[key]
        else:
            return tuple(path[:i])
    return tuple(path)


def _remove(value: Any, path: Sequence[Any]) -> None:
    """Delete the entry at the path, unless one of its containers was deleted before."""
    for key in path[:-1]:
        if not (isinstance(value, dict) and key in value) and not (
            isinstance(value, list) and key < len(value)
        ):
            return
        value = value[key]
    if (isinstance(value, dict) and path[-1] in value) or (
        isinstance(value, list) and path[-1] < len(value)
    ):
        del value[path[-1]]


def _readable(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    if kind in {"dict_type", "model_type"}:
        return "should be a table"
    if kind == "string_pattern_mismatch":
        return "holds characters that cannot be printed"
    return (
        message.removeprefix("Input ")
        if message.startswith("Input ")
        else message[0].lower() + message[1:]
    )


def _joined(name: str, *keys: Any) -> str:
    return ".".join([*([name] if name else []), *(shown(str(key)) for key in keys)])


def left_out(name: str, faults: Sequence[str]) -> str:
    """Return a sentence on the entries of a file that could not be used."""
    more = f" ({len(faults) - 1:,} more)" if len(faults) > 1 else ""
    return f"{name}: {faults[0]}; it is left out{more}."


def printable(text: str) -> str:
    """Return the text with what cannot be printed as an escape sequence: safe on a terminal, and
    valid UTF-8."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shown(text: str) -> str:
    """Return a name as it stands in a sentence: printable and short."""
    return excerpt(text, SHOWN)


def finite(value: Any) -> Any:
    """Return the value with None in place of what is infinite or no number: JSON has no word for
    them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _kind(mode: int) -> str:
    return next((words for test, words in KINDS if test(mode)), "no ordinary file")


def _reason(error: OSError) -> str:
    return "it is a link" if error.errno == errno.ELOOP else error.strerror or type(error).__name__
