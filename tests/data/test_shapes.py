import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.shapes import read_examples, split_pair
from tests.support.chats import REASONING, byte_level
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
        (  # the SFT stage of a recipe on comparisons is the first to read the file
            {"question": "q", "good": "a", "bad": "b"},
            "demonstrations",
            {},
            "Comparisons need prompt, chosen, rejected. Add data.columns = "
            '{ prompt = "question", chosen = "good", rejected = "bad" }.',
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


# --- what other tools write


def test_a_prompt_that_both_dialogues_repeat_is_their_beginning(tmp_path):
    """UltraFeedback's shape."""
    row = {"prompt": "well?", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 9.0}
    example = read(tmp_path, row, "comparisons")
    assert (example.prompt, example.chosen, example.rejected) == ([USER], [YES], [NO])
    assert example.extra == {"score_chosen": 9.0}
    with pytest.raises(DataError, match="x.jsonl:1: prompt is no message of those"):
        read(tmp_path, row | {"prompt": "another"}, "comparisons")


def test_parts_of_text_are_joined_and_parts_of_images_refused_by_name(tmp_path):
    parts = [{"type": "text", "text": "well", "image": None}, {"type": "text", "text": "?"}]
    talk = [{"role": "user", "content": parts}, YES]
    assert read(tmp_path, {"messages": talk}, "prompts").prompt == [USER]
    image = [{"type": "image", "image": "a.png"}, *parts]
    with pytest.raises(DataError, match="messages has a part of type image .* reads text only"):
        read(tmp_path, {"messages": [{"role": "user", "content": image}, YES]}, "prompts")
    with pytest.raises(DataError, match="x.jsonl:1: has images, and Quartet reads text only"):
        read(tmp_path, {"messages": [USER, YES], "images": ["a.png"]}, "prompts")
    assert read(tmp_path, {"messages": [USER, YES], "images": []}, "prompts").prompt == [USER]


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {column: "text"}}}
    for name, column in (("look", "city"), ("add", "numbers"))
]
CALLS = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    for name, arguments in (("look", {"city": "Paris"}), ("add", {"numbers": [1, 2]}))
]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_calls_and_tools_keep_their_own_keys_in_every_format(tmp_path, format):
    """A table gives each call the arguments of all tools, null where they are another tool's."""
    rows = [
        {"messages": [USER, call, {"role": "tool", "content": "4"}, YES], "tools": TOOLS}
        for call in CALLS
    ]
    path = tmp_path / f"x.{format}"
    if format == "jsonl":
        write_lines(path, *map(json.dumps, rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
        filled = pq.read_table(path).to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]
        assert filled["arguments"] == {"city": "Paris", "numbers": None}
    made = byte_level(REASONING)
    encoder = Encoder(made, 1000, 1000)
    examples = read_examples(path, "demonstrations", {})
    records = encoder.demonstrations(examples)
    for example, record, call in zip(examples, records, CALLS, strict=True):
        assert example.completion[0] == call and example.extra["tools"] == TOOLS
        text = made.decode(record.prompt_ids + record.response_ids)
        function = call["tool_calls"][0]["function"]
        assert json.dumps(function) in text and "null" not in text and "None" not in text


def test_an_empty_list_of_calls_is_no_call(tmp_path):
    """Llama 3's template refuses a message whose list of calls is not of one."""
    row = {"messages": [USER, {**YES, "tool_calls": []}]}
    assert read(tmp_path, row, "demonstrations").completion == [YES]


def test_tools_may_be_json_or_stand_in_the_first_message(tmp_path):
    as_text = {"messages": [USER, YES], "tools": json.dumps(TOOLS)}
    assert read(tmp_path, as_text, "prompts").extra["tools"] == TOOLS
    inside = {"messages": [{"role": "system", "content": "s", "tools": TOOLS}, USER, YES]}
    example = read(tmp_path, inside, "prompts")
    assert example.extra["tools"] == TOOLS and "tools" not in example.prompt[0]
    with pytest.raises(DataError, match="x.jsonl:1: tools is text, and not JSON"):
        read(tmp_path, as_text | {"tools": "hammer"}, "prompts")
    with pytest.raises(DataError, match="chat_template_kwargs must be a table"):
        read(tmp_path, as_text | {"chat_template_kwargs": [1]}, "prompts")
    plain = {"prompt": "q", "tools": "hammer"}
    assert read(tmp_path, plain, "prompts").extra["tools"] == "hammer", "no template reads it"


def test_columns_of_openrlhf_and_plain_texts(tmp_path):
    example = read(tmp_path, {"input": "q", "output": "a"}, "demonstrations")
    assert (example.prompt, example.completion) == ("q", "a")
    example = read(tmp_path, {"input": "q", "chosen": "a", "rejected": "b"}, "comparisons")
    assert (example.prompt, example.chosen, example.rejected) == ("q", "a", "b")
    example = read(tmp_path, {"text": "whole"}, "demonstrations")
    assert example.is_text and example.completion == "whole"
    with pytest.raises(DataError, match="found columns question, text"):
        read(tmp_path, {"question": "q", "text": "a"}, "demonstrations")
