import gzip
import json
from pathlib import Path

import pytest

from quartet.data import DataError
from quartet.data.shapes import read_examples, split_pair
from tests.support.world import write_lines

HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you\n\nAssistant: fine, thanks",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you\n\nAssistant: go away",
}
USER, YES, NO = (
    {"role": r, "content": c}
    for r, c in (("user", "well?"), ("assistant", "yes"), ("assistant", "no"))
)
REAL = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl.gz"


def read(tmp_path, row, purpose, columns=None):
    path = write_lines(tmp_path / "x.jsonl", json.dumps(row))
    return read_examples(path, purpose, columns or {})[0]


def test_an_hh_dialogue_is_split_at_its_last_assistant(tmp_path):
    example = read(tmp_path, HH, "comparisons")
    assert example.prompt == "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you\n\nAssistant:"
    assert (example.chosen, example.rejected) == (" fine, thanks", " go away")


def test_dialogues_that_part_earlier_are_split_where_they_still_agree():
    chosen = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: bye"
    rejected = "\n\nHuman: hi\n\nAssistant: what?"
    prompt, good, bad = split_pair("x:1", chosen, rejected)
    assert prompt == "\n\nHuman: hi\n\nAssistant:"
    assert good == " hello\n\nHuman: bye\n\nAssistant: bye" and bad == " what?"


@pytest.mark.skipif(not REAL.exists(), reason="the shared HH file is not beside this checkout")
def test_every_real_hh_row_splits_and_joins_again():
    examples = read_examples(REAL, "comparisons", {})
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        originals = [json.loads(line) for line in file]
    assert len(examples) == len(originals) == 1800
    for example, original in zip(examples, originals, strict=True):
        assert example.prompt + example.chosen == original["chosen"]
        assert example.prompt + example.rejected == original["rejected"]
        assert example.prompt.endswith("\n\nAssistant:")


def test_explicit_pairs_plain_and_conversational(tmp_path):
    plain = read(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}, "comparisons")
    assert (plain.prompt, plain.chosen, plain.rejected) == ("q", "a", "b")
    talk = read(tmp_path, {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, "comparisons")
    assert talk.conversational and talk.chosen == [YES] and talk.rejected == [NO]


def test_an_implicit_prompt_in_messages_is_what_both_sides_share(tmp_path):
    example = read(tmp_path, {"chosen": [USER, YES], "rejected": [USER, NO]}, "comparisons")
    assert (example.prompt, example.chosen, example.rejected) == ([USER], [YES], [NO])


def test_demonstrations_come_in_three_shapes(tmp_path):
    assert read(tmp_path, {"prompt": "q", "completion": "a"}, "demonstrations").completion == "a"
    assert read(tmp_path, {"messages": [USER, YES]}, "demonstrations").completion == [YES]
    assert read(tmp_path, HH, "demonstrations").chosen == " fine, thanks"


def test_prompts_keep_the_other_columns_for_a_verifier(tmp_path):
    example = read(tmp_path, {"prompt": "41+3=", "answer": "44"}, "prompts")
    assert example.prompt == "41+3=" and example.extra == {"answer": "44"}


def test_columns_can_be_named(tmp_path):
    row = {"question": "q", "good": "a", "bad": "b"}
    example = read(
        tmp_path, row, "comparisons", {"prompt": "question", "chosen": "good", "rejected": "bad"}
    )
    assert (example.prompt, example.chosen, example.rejected) == ("q", "a", "b")


@pytest.mark.parametrize(
    ("row", "purpose", "columns", "sentence"),
    [
        (
            {"question": "q", "good": "a", "bad": "b"},
            "comparisons",
            {},
            "x.jsonl: found columns question, good, bad. Comparisons need prompt, chosen, rejected. "
            'Add data.columns = { prompt = "question", chosen = "good", rejected = "bad" }.',
        ),
        (
            {"a": "q"},
            "prompts",
            {},
            'found columns a. Prompts need prompt. Add data.columns = { prompt = "…" }.',
        ),
        (
            {"prompt": "q"},
            "prompts",
            {"prompt": "quest"},
            'data.columns names prompt = "quest", but the columns are prompt.',
        ),
        (
            {"prompt": 3},
            "prompts",
            {},
            "x.jsonl:1: prompt is 3; it must be text or a list of messages.",
        ),
        ({"prompt": None}, "prompts", {}, "x.jsonl:1: prompt is empty; it must be text"),
        (
            {"messages": []},
            "demonstrations",
            {},
            "messages must be a list of messages, and not an empty one.",
        ),
        (
            {"messages": [{"role": "user"}]},
            "prompts",
            {},
            "has a message that is not of the form {role, content}",
        ),
        ({"messages": [USER]}, "demonstrations", {}, 'the last is by "user"; nothing to imitate.'),
        (
            {"chosen": "a", "rejected": "b"},
            "comparisons",
            {},
            "come without a prompt column and are no dialogues",
        ),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, row, purpose, columns, sentence):
    with pytest.raises(DataError) as error:
        read(tmp_path, row, purpose, columns)
    assert sentence in str(error.value)


def test_a_later_row_of_another_shape_is_said(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", '{"prompt": "a"}', '{"question": "b"}')
    with pytest.raises(DataError, match="x.jsonl:2: has columns question"):
        read_examples(path, "prompts", {})


def test_a_file_without_rows_is_said(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        read_examples(write_lines(tmp_path / "x.jsonl", ""), "prompts", {})
