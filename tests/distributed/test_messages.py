"""Messages between ranks: what JSON carries, to the bit."""

import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.distributed.messages import LONG, pack, unpack
from quartet.experience import Prompt, Rollout, rollout_from_row, rollout_to_row

NUMBERS = st.one_of(st.integers(), st.floats(width=64), st.booleans(), st.none())
ONE_TYPE = st.one_of(
    *(
        st.lists(numbers, max_size=2 * LONG)
        for numbers in (
            st.integers(-(2**63), 2**63 - 1),
            st.integers(-(2**70), 2**70),
            st.floats(width=64),
            st.booleans(),
            NUMBERS,
        )
    )
)
VALUES = st.recursive(
    NUMBERS | st.text() | ONE_TYPE | st.lists(st.text(), min_size=LONG, max_size=LONG + 2),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner, max_size=5)
    ),
    max_leaves=20,
)


def to_the_bit(value):
    """Types, and the bits of floats: `==` takes 1 for 1.0 and True, −0.0 for 0.0, and never NaN for NaN."""
    if isinstance(value, dict):
        return {key: to_the_bit(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_the_bit(item) for item in value]
    if isinstance(value, float) and not math.isnan(value):
        return "float", struct.pack("<d", value)
    return type(value).__name__, str(value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_a_message_is_what_json_would_carry(value):
    assert to_the_bit(unpack(pack(value))) == to_the_bit(json.loads(json.dumps(value)))


def test_texts_with_half_a_surrogate_pair_and_tags_of_lists_as_texts_are_kept():
    value = ["\ud83d", "l", ["q", 3], ["l"], [1.0] * LONG, [["d", LONG]], "\x00"]
    assert unpack(pack(value)) == value


def test_long_lists_of_numbers_take_their_bytes_and_no_text():
    """8 bytes for an integer or a float, 1 for a truth value; JSON takes up to 25 for a float."""
    assert len(pack([0.1234567890123456] * 1000)) == len(pack([10**18] * 1000)) < 8000 + 40
    assert len(pack([True] * 1000)) < 1000 + 40


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        pack([{"x": object()}])


def test_a_rollout_arrives_as_it_was():
    rollout = Rollout(
        id="p/0",
        prompt=Prompt("p", tuple(range(40)), "é", {"answer": [1, None]}, [{"role": "user"}]),
        group=3,
        response_ids=tuple(range(50)),
        response="y",
        logprobs=(-0.1, float("-inf")) * 25,
        finish_reason="stop",
        policy_version=2,
        components={"a": None},
        policy_mask=(True, False) * 25,
        versions=(1, 2) * 25,
    )
    assert rollout_from_row(unpack(pack(rollout_to_row(rollout)))) == rollout
