"""Rows on disk come back as they were."""

import datetime
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartet.data import disk_rows
from quartet.data.disk_rows import DiskRows, Subset
from quartet.data.records import Comparison, Demonstration
from quartet.experience import Prompt

cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
ids = st.lists(st.integers(0, 2**31)).map(tuple)
prompts = st.tuples(
    st.text(),
    ids,
    st.text(),
    st.dictionaries(st.text(), cells),
    st.none() | st.lists(st.dictionaries(st.text(), cells)),
)
comparisons = st.tuples(st.text(), ids, ids, ids, st.floats(allow_nan=False))
demonstrations = st.tuples(st.text(), ids, ids, st.none() | st.lists(st.booleans()).map(tuple))
kinds = st.one_of(
    st.tuples(st.just(kind), st.lists(cells))
    for kind, cells in (
        (Prompt, prompts),
        (Comparison, comparisons),
        (Demonstration, demonstrations),
    )
)


@given(kinds)
@pytest.mark.slow
def test_what_is_put_in_comes_out(given):
    kind, cells = given
    rows = [kind(*row) for row in cells]
    made = DiskRows(kind, rows)
    assert list(made) == rows
    assert list(made[1:]) == rows[1:] and made[1:] == Subset(made, range(1, len(rows)))


def test_large_shelves_are_on_disk_and_read_in_any_order(monkeypatch):
    monkeypatch.setattr(disk_rows, "IN_MEMORY_BYTES", 1000)
    rows = [Demonstration(f"x:{i}", (i,), tuple(range(i % 50))) for i in range(500)]
    made = DiskRows(Demonstration, rows[:400])
    for row in rows[400:]:
        assert made[len(made) - 1] == rows[len(made) - 1]  # reading between two writes
        made.append(row)
    assert made._file._rolled
    order = random.Random(0).sample(range(500), 500)
    assert [made[i] for i in order] == [rows[i] for i in order]
    assert made[-1] == rows[-1]


def test_a_date_comes_back_as_text():
    [prompt] = DiskRows(Prompt, [Prompt("x:1", (1,), "a", {"day": datetime.date(2026, 1, 2)})])
    assert prompt.extra == {"day": "2026-01-02"}


def test_half_surrogates_survive():
    """JSON may hold "\\ud83d" alone; Python reads it, UTF-8 has no form for it."""
    [prompt] = DiskRows(Prompt, [Prompt("x:1", (1,), "\ud83d")])
    assert prompt.text == "\ud83d"
