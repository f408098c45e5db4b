"""Rows with more tokens than the limits allow: refused, dropped, or cut on one side."""

import pytest

from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from tests.support.world import tokenizer

PROMPT, ANSWER = "1 + 2 + 3 + 4 = ", "10 and more"


def encoder(**settings):
    settings = {"max_prompt_tokens": 4, "max_response_tokens": 3} | settings
    return Encoder(tokenizer(), **settings)


def ids(text):
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def row(name="f:1", prompt=PROMPT, **cells):
    return Example(name, prompt, **cells)


SHORT = row("f:2", "1 =", completion="2")


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, True),
        ({"unusable": "drop"}, False),
        ({"too_long": "drop"}, False),
        ({"unusable": "drop", "too_long": "refuse"}, True),
    ],
)
def test_what_too_long_says_counts_more_than_unusable(settings, stops):
    made = encoder(**settings)
    rows = [row(completion="2"), SHORT]
    if stops:
        with pytest.raises(DataError, match=r"f:1: the prompt has .* \(data.max_prompt_tokens\)"):
            made.demonstrations(rows)
    else:
        assert [d.id for d in made.demonstrations(rows)] == ["f:2"] and list(made.dropped) == [
            "f:1"
        ]


def test_rows_that_cannot_be_used_otherwise_are_not_too_long():
    made = encoder(too_long="drop")
    with pytest.raises(DataError, match='f:1: the prompt is empty.*set data.unusable = "drop"'):
        made.demonstrations([row(prompt=" ", completion="2"), SHORT])


def test_a_refusal_names_the_key_that_ends_it():
    made = encoder(unusable="drop", too_long="refuse")
    with pytest.raises(DataError, match='set data.too_long = "drop" to go on'):
        made.demonstrations([row(completion="2"), SHORT])


def test_a_prompt_keeps_its_end_or_its_beginning():
    assert len(ids(PROMPT)) > 4
    [left] = encoder(too_long="truncate_left").prompts([row()])
    [right] = encoder(too_long="truncate_right").prompts([row()])
    assert left.ids == ids(PROMPT)[-4:] and right.ids == ids(PROMPT)[:4]
    assert left.text == tokenizer().decode(left.ids), "what a reward reads is what the policy read"


def test_the_beginning_of_sequence_stays():
    made = encoder(too_long="truncate_left")
    cut = made.truncation.prompt("f:1", [7, 1, 2, 3, 4, 5], 4, 7, is_conversation=False)
    assert cut == [7, 3, 4, 5]
    assert made.truncation.prompt("f:1", [7, 1, 2], 1, 7, is_conversation=False) == [7]


@pytest.mark.parametrize("way", ["truncate_left", "truncate_right"])
def test_a_response_keeps_its_beginning_and_has_no_end_token(way):
    made = encoder(too_long=way, max_prompt_tokens=99)
    [cut, whole] = made.demonstrations([row(completion=ANSWER), SHORT])
    assert cut.response_ids == ids(ANSWER)[:3] and cut.prompt_ids == ids(PROMPT)
    assert whole.response_ids[-1] == tokenizer().eos_token_id not in cut.response_ids
    [note] = [note for note in made.notes() if "truncated" in note]
    assert note.startswith("1 rows were truncated (data.too_long), the first: f:1: the completion")


def test_a_running_text_keeps_its_beginning():
    [cut] = encoder(too_long="truncate_left").demonstrations(
        [Example("f:1", "", completion=PROMPT, is_text=True)]
    )
    assert (*cut.prompt_ids, *cut.response_ids) == ids(PROMPT)[:4]


def test_both_sides_of_a_comparison_keep_the_same_prompt():
    made = encoder(too_long="truncate_left")
    [pair] = made.comparisons([row(chosen=ANSWER, rejected="5")])
    assert pair.prompt_ids == ids(PROMPT)[-4:] and pair.chosen_ids == ids(ANSWER)[:3]
    assert pair.rejected_ids == (*ids("5"), tokenizer().eos_token_id)


def test_sides_that_become_equal_cannot_be_used():
    made = encoder(too_long="truncate_left")
    with pytest.raises(DataError, match="identical once they are truncated"):
        made.comparisons([row(chosen=ANSWER + " x", rejected=ANSWER + " y")])


def test_the_model_s_own_length_cuts_the_response():
    made = encoder(too_long="truncate_left", max_response_tokens=99, max_tokens=6)
    [cut] = made.demonstrations([row(completion=ANSWER)])
    assert len(cut.prompt_ids) == 4 and cut.response_ids == ids(ANSWER)[:2]


def test_nothing_learnt_is_left_is_a_row_that_cannot_be_used():
    made = encoder(too_long="truncate_left")
    with pytest.raises(DataError, match="Nothing that is learnt would be left"):
        made.truncation.response("f:1", [1, 2, 3], [False, False, True], 2, "long.")


def test_a_conversation_is_not_cut_on_the_right():
    made = encoder(too_long="truncate_right")
    with pytest.raises(DataError, match='use "truncate_left"'):
        made.truncation.prompt("f:1", [1, 2, 3], 2, None, is_conversation=True)
    assert made.truncation.rows == {}
