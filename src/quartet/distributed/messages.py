"""Values between ranks as bytes: what JSON can hold, with long lists of numbers as plain arrays.

`unpack(pack(value))` equals `json.loads(json.dumps(value))`, number types, NaN and −0.0 included.
JSON alone would hold the interpreter while it writes or reads a message as a whole, for seconds at
a million tokens; a thread that gives signs of life stands still meanwhile.

A message is the length of a header (8 bytes), the header in JSON, and the arrays. In the header,
each list begins with a tag: `LIST` before its items, or the type of an array before its length.
"""

import json
from array import array
from collections.abc import Iterator
from typing import Any

LONG = 16
"""Lists of at least so many numbers of one type become arrays."""
LIST = "l"
TYPES = {int: "q", float: "d", bool: "b"}
"""The types of numbers that become arrays, and the `array` that holds them."""


def pack(value: Any) -> bytes:
    """Return the bytes of a value. Raises TypeError where JSON cannot hold it."""
    arrays: list[array[Any]] = []
    header = "".join(_header(value, arrays)).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *arrays])


def unpack(message: bytes | memoryview) -> Any:
    """Return the value of the bytes that `pack` has returned."""
    message = memoryview(message).cast("B")
    end = 8 + int.from_bytes(message[:8], "little")
    return _Reader(message[end:]).value(json.loads(bytes(message[8:end])))


def _header(value: Any, arrays: "list[array[Any]]") -> Iterator[str]:
    """Yield the pieces of the header, and append the arrays. Each item of the outer lists is a
    piece of its own, since the interpreter is held for each as a whole."""
    if not isinstance(value, list | tuple) or _array(value) is not None:
        yield json.dumps(_without_arrays(value, arrays))
        return
    yield f'["{LIST}"'
    for item in value:
        yield ","
        yield from _header(item, arrays)
    yield "]"


def _without_arrays(value: Any, arrays: "list[array[Any]]") -> Any:
    """Return the value with tags in its lists, and append its arrays."""
    if isinstance(value, dict):
        return {key: _without_arrays(item, arrays) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if (numbers := _array(value)) is not None:
        arrays.append(numbers)
        return [numbers.typecode, len(numbers)]
    return [LIST, *(_without_arrays(item, arrays) for item in value)]


def _array(values: list[Any] | tuple[Any, ...]) -> "array[Any] | None":
    """Return the values as an array; None unless they are many numbers of one type that it can
    hold."""
    kinds = set(map(type, values)) if len(values) >= LONG else set()
    code = TYPES.get(kinds.pop()) if len(kinds) == 1 else None
    if code is None:
        return None
    try:
        return array(code, values)
    except OverflowError:  # integers beyond 64 bits
        return None


class _Reader:
    """Takes arrays from the front of the bytes behind a header, in the order of their tags."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def value(self, packed: Any) -> Any:
        """Return a value of the header with its arrays in place of their tags."""
        if isinstance(packed, dict):
            return {key: self.value(item) for key, item in packed.items()}
        if not isinstance(packed, list):
            return packed
        tag, *items = packed
        return list(map(self.value, items)) if tag == LIST else self._numbers(tag, *items)

    def _numbers(self, typecode: str, count: int) -> list[Any]:
        numbers: array[Any] = array(typecode)
        size = count * numbers.itemsize
        numbers.frombytes(self.data[:size])
        self.data = self.data[size:]
        return list(map(bool, numbers)) if typecode == TYPES[bool] else numbers.tolist()
