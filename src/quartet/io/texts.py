"""Text from outside (servers, judges, reward functions, files), made safe to write and to print.

Python's strings can hold half a surrogate pair, which JSON can spell (`"\\ud800"`) and UTF-8
cannot. Such a string is fine until it is written to a file or a terminal; then it raises
UnicodeEncodeError, far from its origin. Text from outside goes through one of these functions where
it enters.
"""

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEEPEST = 100
"""Levels of lists and objects that JSON from outside may have."""


def well_formed(text: str) -> str:
    r"""Return the text with each lone surrogate spelled as its escape: "a\ud800" becomes the seven
    characters `a\ud800`. Text that UTF-8 can hold is returned as it is."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def well_formed_json(value: Any, depth: int = DEEPEST) -> Any:
    """Return the value that JSON was parsed to with all its texts, keys included, well-formed.
    Raises RecursionError where lists and objects are nested deeper than `depth`."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list | dict) and depth == 0:
        raise RecursionError("nested too deeply")
    if isinstance(value, list):
        return [well_formed_json(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {well_formed(key): well_formed_json(item, depth - 1) for key, item in value.items()}
    return value


def excerpt(text: str | bytes, limit: int = 200) -> str:
    """Return the beginning of a text, on one line and printable, for a message that quotes it:
    control characters, escape sequences of terminals among them, are spelled as escapes; bytes that
    are no UTF-8 are shown as �."""
    long = len(text) > 4 * limit
    text = text[: 4 * limit]
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    line = " ".join(text.split())
    printable = "".join(c if c.isprintable() else _escape(c) for c in line)
    shown = printable[:limit]
    return f"{shown} …" if long or len(printable) > limit else shown


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def type_in_words(value: object) -> str:
    """Return the name of a value's type with its article: "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def nearest(value: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a value, in capitals or not; None if none is. A name
    with the same letters in another order goes first: gpro is grpo, not gspo."""
    lower, names = str(value).lower(), {name.lower(): name for name in known}
    near = difflib.get_close_matches(lower, list(names), n=3)
    same = [name for name in near if sorted(name) == sorted(lower)]
    return next((names[name] for name in [*same, *near]), None)


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return " Did you mean X?" with the `nearest` known name; "" if none is."""
    near = nearest(value, known)
    return "" if near is None else f" Did you mean {near}?"


def not_utf8(error: UnicodeDecodeError, where: str) -> str:
    """Return what is wrong with bytes that are not UTF-8, and what to do about them."""
    utf16 = error.start == 0 and error.object[:2] in {b"\xff\xfe", b"\xfe\xff"}
    return f"not UTF-8 text ({where}).{' It looks like UTF-16.' if utf16 else ''} Save it as UTF-8."


def line_of(error: UnicodeDecodeError) -> int:
    """Return the line, counted from 1, of the first byte that is not UTF-8."""
    return error.object.count(b"\n", 0, error.start) + 1


def typed(path: Path | str) -> str:
    """Return a path as it is typed in a shell: quoted where a shell needs it, and never taken for
    an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
