"""Data files: what is no file of its format, and rows that cannot be used."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quartet.data import DataError
from quartet.data.encoding import Encoder
from quartet.data.shapes import read_examples
from quartet.data.tokenizer import train_tokenizer
from quartet.models.chat import NAMED_TEMPLATES
from tests.malformed.saying import refusal

USER, ANSWER = {"role": "user", "content": "was it good"}, {"role": "assistant", "content": "very"}
OTHER = {**ANSWER, "content": "no"}
PROMPT = {"prompt": "was it"}
FINE = "It is the first row."


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["was it good very no <|im_start|> user assistant <|im_end|>"] * 5, 320)
    made.chat_template = NAMED_TEMPLATES["chatml"]
    return made


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*columns, **named):
    return lambda path: pq.write_table(pa.table(named), path)


def said_of(tmp_path, monkeypatch, tokenizer, name, content, purpose="prompts", columns=None):
    """What a stage says that reads the file for this purpose."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)
    kind = "comparisons" if purpose == "preferences" else purpose
    encode = getattr(Encoder(tokenizer, max_prompt_tokens=100, max_response_tokens=100), kind)
    return refusal(DataError, lambda: encode(read_examples(path, purpose, columns or {})))


def folder(**files):
    def make(path):
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)

    return make


def truncated(path):
    pq.write_table(pa.table({"prompt": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:200])


FILES = {
    "empty": ("x.jsonl", b"", "x.jsonl: has no rows."),
    "blank lines": ("x.jsonl", b"\n\n  \n", "x.jsonl: has no rows."),
    "single quotes": ("x.jsonl", b"{'prompt': 'a'}\n", "x.jsonl:1: not JSON (expecting property name enclosed in double quotes at character 2)."),
    "comma behind the last": ("x.jsonl", b'{"prompt": "a",}\n', "x.jsonl:1: not JSON ("),
    "two objects on a line": ("x.jsonl", b'{"prompt": "a"}{"prompt": "b"}\n', "x.jsonl:1: not JSON (extra data at character 16)."),
    "a list on a line": ("x.jsonl", b'[{"prompt": "a"}]\n', "x.jsonl:1: is a list, not an object with named columns. Is it one JSON list? Call it .json."),
    "a text on a line": ("x.jsonl", b'"hello"\n', "x.jsonl:1: is a text, not an object with named columns. " + FINE),
    "null on a line": ("x.jsonl", b"null\n", "x.jsonl:1: is null, not an object with named columns."),
    "true on a line": ("x.jsonl", lines(PROMPT, True), "x.jsonl:2: is true or false, not an object with named columns. The row before it is fine."),
    "utf-16": ("x.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "x.jsonl:1: not UTF-8 text (byte 0 of the line). It looks like UTF-16. Save it as UTF-8."),
    "a list over two lines": ("x.jsonl", b'[1,\n2]\n', "x.jsonl:1: not JSON (expecting value at character 4)."),
    "an empty json": ("x.json", b" \n", "x.json: has no rows."),
    "tabs called csv": ("x.csv", b"prompt\tcompletion\na\tb\n", "x.csv:1: the cells are separated by tabs, not by commas."),
    "csv in latin-1": ("x.csv", b"prompt\n\xe9\n", "x.csv: not UTF-8 text (invalid continuation byte). Save it as UTF-8."),
    "zeros": ("x.jsonl", lines(PROMPT) + b"\0\0\0\n", "x.jsonl:2: not JSON (expecting value at character 1). The row before it is fine."),
    "a NUL in a text": ("x.jsonl", b'{"prompt": "a\0b"}\n', "x.jsonl:1: not JSON (invalid control character at character 14)."),
    "a line break in a text": ("x.jsonl", b'{"prompt": "a\nb"}\n', "x.jsonl:1: not JSON (line ends inside a string)."),
    "html": ("x.jsonl", b"<!DOCTYPE html>\n", "x.jsonl:1: not JSON (expecting value at character 1)."),
    "csv called jsonl": ("x.jsonl", b"prompt,completion\na,b\n", "x.jsonl:1: not JSON (expecting value at character 1)."),
    "parquet called jsonl": ("x.jsonl", parquet(prompt=["a"]), "x.jsonl:1: not JSON"),
    "gzip called jsonl": ("x.jsonl", gzip.compress(lines(PROMPT)), "x.jsonl:1: not UTF-8 text (byte 1 of the line)."),
    "jsonl called json": ("x.json", lines(PROMPT, PROMPT), "x.json:2: not JSON (extra data). Is it JSON lines? Call it .jsonl."),
    "jsonl called parquet": ("x.parquet", lines(PROMPT), "x.parquet: not a parquet file (Parquet magic bytes not found in footer)."),
    "jsonl called gzip": ("x.jsonl.gz", lines(PROMPT), "x.jsonl.gz: the compressed file is damaged (Not a gzipped file"),
    "an object": ("x.json", b'{"data": [{"prompt": "a"}]}', "x.json: is an object, not a list of rows."),
    "a list of texts": ("x.json", b'["a"]', "x.json:1: is a text, not an object with named columns."),
    "half a list": ("x.json", b'[{"prompt": "a"},\n {"pro', "x.json:2: not JSON (unterminated string starting at)."),
    "json in latin-1": ("x.json", b'[{"prompt": "\xe9"}]', "x.json: not UTF-8 text (byte 13)."),
    "an empty list": ("x.json", b"[]", "x.json: has no rows."),
    "null": ("x.json", b"null", "x.json: is null, not a list of rows."),
    "a header alone": ("x.csv", b"prompt,completion\n", "x.csv: has no rows."),
    "other separators": ("x.csv", b"prompt;completion\na;b\n", "x.csv:1: the cells are separated by semicolons, not by commas."),
    "a blank cell": ("x.csv", b"prompt,completion\n,b\n", "x.csv:2: the prompt is empty."),
    "csv in utf-16": ("x.csv", "prompt\na\n".encode("utf-16"), "x.csv: not UTF-8 text"),
    "a quote within": ("x.csv", b'prompt\n"a"b\n', "not CSV (',' expected after '\"')."),
    "empty parquet": ("x.parquet", b"", "x.parquet: not a parquet file (Parquet file size is 0 bytes)."),
    "half a parquet": ("x.parquet", truncated, "x.parquet: not a parquet file"),
    "parquet without rows": ("x.parquet", parquet(prompt=pa.array([], pa.string())), "x.parquet: has no rows."),
    "parquet without columns": ("x.parquet", parquet(), "x.parquet: has no rows."),
    "bytes in parquet": ("x.parquet", parquet(prompt=pa.array([b"\xff"])), "x.parquet:1: prompt is b'\\xff'; it must be text or a list of messages."),
    "numbers in parquet": ("x.parquet", parquet(prompt=[1]), "x.parquet:1: prompt is 1; it must be text or a list of messages."),
    "null in parquet": ("x.parquet", parquet(prompt=pa.array(["a", None])), "x.parquet:2: prompt is empty; it must be text or a list of messages."),
    "half a gzip": ("x.jsonl.gz", gzip.compress(lines(*[PROMPT] * 500))[:-30], "x.jsonl.gz: the compressed file is damaged"),
    "another checksum": ("x.jsonl.gz", gzip.compress(lines(PROMPT))[:-8] + b"\0" * 8, "the compressed file is damaged (CRC check failed"),
    "more behind a gzip": ("x.jsonl.gz", gzip.compress(lines(PROMPT)) + b"more", "the compressed file is damaged"),
    "a link to nowhere": ("x.jsonl", lambda path: path.symlink_to("gone"), "x.jsonl: no such file."),
    "a link to itself": ("x.jsonl", lambda path: path.symlink_to("x.jsonl"), "x.jsonl: no such file."),
    "no folder": ("no/such/folder/x.jsonl", None, "no/such/folder/x.jsonl: no such file."),
    "tabs": ("x.tsv", b"a\tb\n", "x.tsv: not a format that is read here. Use .jsonl"),
    "another compression": ("x.jsonl.zst", b"x", "x.jsonl.zst: not a format that is read here."),
    "a folder called a file": ("x.jsonl", folder(), "x.jsonl: is a folder without .jsonl, .jsonl.gz"),
    "a folder of texts": ("d", folder(a_txt=b"x"), "d: is a folder without .jsonl, .jsonl.gz"),
    "a bad file among good ones": ("d", folder(a_jsonl=lines(PROMPT), b_jsonl=b"{"), "b.jsonl:1: not JSON"),
    "other columns in a second file": ("d", folder(a_jsonl=lines(PROMPT), b_jsonl=lines({"q": "x"})), "b.jsonl:1: has columns q; the rows before it had prompt."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), FILES.values(), ids=FILES)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, tokenizer, name, content, sentence):
    assert sentence in said_of(tmp_path, monkeypatch, tokenizer, name, content)


COLUMNS = {
    "comparisons": ("comparisons", {}, [{"question": "a", "good": "b", "bad": "c"}], 'Add data.columns = { prompt = "question", chosen = "good", rejected = "bad" }.'),
    "demonstrations": ("demonstrations", {}, [{"question": "a"}], 'Demonstrations need prompt, completion. Add data.columns = { prompt = "question", completion = "…" }.'),
    "preferences": ("preferences", {}, [{"prompt": "a", "completion": "b"}], "Preferences need prompt, completion, label."),
    "conversations for comparisons": ("comparisons", {}, [{"messages": [USER, ANSWER]}], "x.jsonl: found columns messages. Comparisons need prompt, chosen, rejected."),
    "none at all": ("prompts", {}, [{}], "x.jsonl: found columns (none). Prompts need prompt."),
    "capitals": ("prompts", {}, [{"Prompt": "a"}], "x.jsonl: found columns Prompt. Prompts need prompt."),
    "a name that is not there": ("prompts", {"prompt": "question"}, [{"q": "a"}], 'x.jsonl: data.columns names prompt = "question", but the columns are q.'),
    "a later row": ("prompts", {}, [PROMPT, {"promt": "a"}], "x.jsonl:2: has columns promt; the rows before it had prompt."),
    "a later comparison": ("comparisons", {}, [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}], "x.jsonl:2: has columns prompt, chosen; the rows before it had prompt, chosen, rejected."),
}  # fmt: skip


@pytest.mark.parametrize(("purpose", "columns", "rows", "sentence"), COLUMNS.values(), ids=COLUMNS)
def test_columns_that_are_not_there(
    tmp_path, monkeypatch, tokenizer, purpose, columns, rows, sentence
):
    assert sentence in said_of(
        tmp_path, monkeypatch, tokenizer, "x.jsonl", lines(*rows), purpose, columns
    )


TEXT = "it must be text or a list of messages."
FORM = "has a message that is not of the form {role, content}: "


def pair(**cells):
    return {"prompt": "p", "chosen": "c", "rejected": "r", **cells}


def labelled(label):
    return {"prompt": "p", "completion": "c", "label": label}


def hh(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


ROWS = {
    "prompt null": ("prompts", {"prompt": None}, "prompt is empty; " + TEXT),
    "prompt a number": ("prompts", {"prompt": 3}, "prompt is 3; " + TEXT),
    "prompt NaN": ("prompts", {"prompt": float("nan")}, "prompt is nan; " + TEXT),
    "prompt true": ("prompts", {"prompt": True}, "prompt is True; " + TEXT),
    "prompt one message": ("prompts", {"prompt": USER}, "prompt is {'role': 'user', 'content': 'was it good'}; " + TEXT),
    "prompt no messages": ("prompts", {"prompt": []}, "prompt must be a list of messages, and not an empty one."),
    "prompt null in a list": ("prompts", {"prompt": [None]}, "prompt " + FORM + "None."),
    "prompt texts": ("prompts", {"prompt": ["a"]}, "prompt " + FORM + "'a'."),
    "prompt without content": ("prompts", {"prompt": [{"role": "user"}]}, "prompt " + FORM + "{'role': 'user'}."),
    "prompt without role": ("prompts", {"prompt": [{"content": "a"}]}, "prompt " + FORM + "{'content': 'a'}."),
    "prompt with null content": ("prompts", {"prompt": [{**USER, "content": None}]}, "prompt " + FORM),
    "prompt of an image": ("prompts", {"prompt": [{**USER, "content": [{"type": "image_url", "image_url": "a"}]}]}, "prompt has a part of type image_url in a message, and Quartet reads text only."),
    "prompt of parts without a type": ("prompts", {"prompt": [{**USER, "content": [{"text": "a"}]}]}, "prompt has a part {'text': 'a'} in a message"),
    "prompt with a role of 3": ("prompts", {"prompt": [{**USER, "role": 3}]}, "prompt " + FORM),
    "prompt in two lists": ("prompts", {"prompt": [[USER]]}, "prompt " + FORM),
    "prompt of blanks": ("prompts", {"prompt": " \n\t"}, "the prompt is empty."),
    "prompt too long": ("prompts", {"prompt": "x" * 1000}, "the prompt has 1,000 tokens, the limit is 100 (data.max_prompt_tokens)."),
    "completion null": ("demonstrations", {**PROMPT, "completion": None}, "completion is empty; " + TEXT),
    "completion empty": ("demonstrations", {**PROMPT, "completion": ""}, "the completion is empty, a response of zero tokens."),
    "completion an object": ("demonstrations", {**PROMPT, "completion": {"a": 1}}, "completion is {'a': 1}; " + TEXT),
    "completion too long": ("demonstrations", {**PROMPT, "completion": "x" * 500}, "the completion has 501 tokens, the limit is 100 (data.max_response_tokens)."),
    "nobody answers": ("demonstrations", {"messages": [USER]}, 'no message is by the assistant, the last is by "user"; nothing to imitate.'),
    "role misspelt": ("demonstrations", {"messages": [USER, {**ANSWER, "role": "asistant"}]}, 'no message is by the assistant, the last is by "asistant"'),
    "role with a capital": ("demonstrations", {"messages": [USER, {**ANSWER, "role": "Assistant"}]}, 'no message is by the assistant, the last is by "Assistant"'),
    "the assistant first": ("demonstrations", {"messages": [ANSWER, USER]}, "the first message is the assistant's; a message of another role must come before it."),
    "an empty answer": ("demonstrations", {"messages": [USER, {**ANSWER, "content": ""}]}, "the completion is empty, a response of zero tokens."),
    "messages text": ("demonstrations", {"messages": "hi"}, "messages must be a list of messages, and not an empty one."),
    "messages none": ("demonstrations", {"messages": []}, "messages must be a list of messages, and not an empty one."),
    "no content, no tool": ("demonstrations", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "messages " + FORM),
    "ShareGPT's words in messages": ("demonstrations", {"messages": [{"from": "human", "value": "q"}]}, "messages " + FORM),
    "ShareGPT ends with a question": ("demonstrations", {"conversations": [{"from": "human", "value": "a"}]}, "no message is by the assistant"),
    "ShareGPT begins with an answer": ("demonstrations", {"conversations": [{"from": "gpt", "value": "a"}]}, "the first message is the assistant's"),
    "Alpaca without output": ("demonstrations", {"instruction": "a", "output": None}, "completion is empty; " + TEXT),
    "equal": ("comparisons", pair(rejected="c"), "chosen and rejected are identical, so there is nothing to learn from this row."),
    "equal as messages": ("comparisons", pair(prompt=[USER], chosen="very", rejected=[ANSWER]), "chosen and rejected are identical"),
    "chosen empty": ("comparisons", pair(chosen=""), "the chosen is empty, a response of zero tokens."),
    "chosen null": ("comparisons", pair(chosen=None), "chosen is empty; " + TEXT),
    "rejected a number": ("comparisons", pair(rejected=3), "rejected is 3; " + TEXT),
    "several turns": ("comparisons", pair(prompt=[USER], chosen=[ANSWER, USER, OTHER], rejected=[OTHER]), "the chosen has several turns after the prompt; one answer of the assistant can be compared."),
    "margin text": ("comparisons", pair(margin="1"), "margin = '1' is no number; it says by how much chosen is better."),
    "margin null": ("comparisons", pair(margin=None), "margin = None is no number"),
    "margin true": ("comparisons", pair(margin=True), "margin = True is no number"),
    "margin a list": ("comparisons", pair(margin=[1]), "margin = [1] is no number"),
    "no dialogues": ("comparisons", {"chosen": "a", "rejected": "b"}, "chosen and rejected come without a prompt column and are no dialogues"),
    "dialogues of other questions": ("comparisons", {"chosen": hh("q", "a"), "rejected": hh("z", "b")}, "with a common beginning. Add a column prompt."),
    "a dialogue without answer": ("comparisons", {"chosen": hh("q", ""), "rejected": hh("q", "a")}, "the chosen is empty"),
    "messages of other questions": ("comparisons", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "z"}, OTHER]}, "chosen and rejected have no message in common to be the prompt."),
    "text against messages": ("comparisons", {"chosen": [USER, ANSWER], "rejected": "x"}, "one of chosen and rejected is text, the other a list of messages."),
    "OpenAI's without input": ("comparisons", {"input": None, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]}, "prompt is empty; " + TEXT),
    "label text": ("preferences", labelled("true"), "label is 'true'; it must be true for a good completion, false for a bad one."),
    "label 2": ("preferences", labelled(2), "label is 2; it must be true"),
    "label half": ("preferences", labelled(0.5), "label is 0.5; it must be true"),
    "label null": ("preferences", labelled(None), "label is None; it must be true"),
    "label a list": ("preferences", labelled([1]), "label is [1]; it must be true"),
}  # fmt: skip


@pytest.mark.parametrize(("purpose", "row", "sentence"), ROWS.values(), ids=ROWS)
def test_rows_that_cannot_be_used(tmp_path, monkeypatch, tokenizer, purpose, row, sentence):
    said = said_of(tmp_path, monkeypatch, tokenizer, "x.jsonl", lines(row), purpose)
    assert said.startswith("x.jsonl:1: ") and sentence in said
