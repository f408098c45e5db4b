"""Text from outside is writable and printable."""

import json

import pytest

from quartet.io.texts import excerpt, well_formed, well_formed_json


def test_half_a_surrogate_pair_is_spelled_and_all_else_stays():
    assert well_formed("a\ud800b") == "a\\ud800b"
    for text in ("", "plain", "größer 🙂\n\x1b[0m", "\u2028\x85"):
        assert well_formed(text) == text


def test_every_text_of_a_json_value_is_well_formed():
    value = json.loads('{"a\\udfff": ["\\ud800", 1, null, {"b": "\\ud83d\\ude42"}], "c": NaN}')
    cleaned = well_formed_json(value)
    assert cleaned["a\\udfff"] == ["\\ud800", 1, None, {"b": "🙂"}] and cleaned["c"] != cleaned["c"]
    json.dumps(cleaned, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\r\n of\ttext ", "two lines of text"),
        ("\x1b[2Jgone\x00", "\\x1b[2Jgone\\x00"),
        ("a\ud800", "a\\ud800"),
        ("ab\u202ecd", "ab\\u202ecd"),
        (b"\xff\xfe\xfa", "���"),
        (b"gr\xc3\xbc\xc3\x9fe", "grüße"),
        ("x" * 201, "x" * 200 + " …"),
        ("x" * 200, "x" * 200),
        (b"[" * 10**7, "[" * 200 + " …"),
        (" " * 1000 + "late", " …"),
        ("", ""),
    ],
)
def test_an_excerpt_is_one_printable_line(text, shown):
    assert excerpt(text) == shown
