import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quartet.data import DataError, files
from quartet.data.files import rows
from quartet.io.install import install_command
from tests.support.world import write_lines

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def read(path):
    return list(rows(path))


def test_every_format_gives_the_same_rows(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "x.jsonl").write_text(text)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(text)
    (tmp_path / "x.csv").write_text('prompt,completion\na,b\n"c",d\n')
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"):
        assert [row for _, row in read(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_half_a_surrogate_pair_is_spelled_as_its_escape(tmp_path, name):
    row = {"prompt": "a \ud83d b", "messages": [{"content": "\ude00"}], "whole": "\U0001f600"}
    (tmp_path / name).write_text(json.dumps(row if name == "x.jsonl" else [row]))
    [(_, found)] = read(tmp_path / name)
    assert found["prompt"] == r"a \ud83d b" and found["messages"] == [{"content": r"\ude00"}]
    assert found["whole"] == "\U0001f600"


def test_rows_know_their_place(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", json.dumps(ROWS[0]), "", json.dumps(ROWS[1]))
    assert [place for place, _ in read(path)] == ["x.jsonl:1", "x.jsonl:3"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "x.jsonl",
            b'{"a": 1}\n{"a": "unfini\n',
            "x.jsonl:2: not JSON (line ends inside a string). The row before it is fine.",
        ),
        (
            "x.jsonl",
            b"[1, 2]\n",
            "x.jsonl:1: is a list, not an object with named columns. Is it one JSON list?",
        ),
        (
            "x.jsonl",
            b'{"a": 1}\n{"a": 2}\n3\n',
            "x.jsonl:3: is a number, not an object with named columns. 2 rows before it are fine.",
        ),
        (
            "x.jsonl",
            b'{"a": "\xff"}\n',
            "x.jsonl:1: not UTF-8 text (byte 7 of the line). Save it as UTF-8. It is the first row.",
        ),
        ("x.jsonl.gz", b"not gzip", "x.jsonl.gz: the compressed file is damaged"),
        (
            "x.csv",
            b"a,b\n1,2\n1,2,3\n",
            "x.csv:3: has another number of cells than the 2 columns of the header.",
        ),
        ("x.csv", b"a,b\n1,2\n1\n", "x.csv:3: has another number of cells"),
        ("x.csv", b'a,b\n1,"2\n', "not CSV (unexpected end of data)"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: JSON that cannot be read: too deep"),
        ("x.json", b"[" * 100_000, "x.json: JSON that cannot be read: too deep"),
        ("x.json", b'[{"a": ' + b"1" * 5000 + b"}]", "x.json: JSON that cannot be read"),
        ("x.parquet", b"PAR0", "x.parquet: not a parquet file"),
        ("x.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "x.jsonl:2: has 'a' twice. Keep one."),
        ("x.jsonl", b'{"b": [{"a": 1, "a": 3}]}\n', "x.jsonl:1: has 'a' twice. Keep one."),
        ("x.json", b'[{"a": 1, "a": 3}]', "x.json: a row has 'a' twice. Keep one."),
        ("x.csv", b"a,b,a\n1,2,3\n", "x.csv:1: two columns are called 'a'. Rename one."),
        (
            "x.txt",
            b"hello",
            "not a format that is read here. Use .jsonl, .jsonl.gz, .json, .csv or .parquet.",
        ),
    ],
)
def test_what_is_broken_is_said_with_its_place(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert sentence in str(error.value)


def test_two_columns_of_one_name_are_refused_in_parquet(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: two columns are called 'a'. Rename one."):
        read(tmp_path / "x.parquet")


def test_a_truncated_gzip_is_damaged_and_not_short(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 500).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "x.jsonl.gz")


def test_a_file_that_is_not_there_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"promts.jsonl: no such file. Did you mean prompts.jsonl"):
        read(tmp_path / "promts.jsonl")
    with pytest.raises(
        DataError, match=r"other.jsonl: no such file\.$"
    ):  # only the ending is alike
        read(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"aaa: no such file\.$"):  # no traceback of the system's
        read(Path("a" * 300))


def test_missing_files_and_folders_are_said(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_folders_that_the_package_datasets_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    assert list(rows(tmp_path / "one")) == [("one:1", {"prompt": "a"}), ("one:2", {"prompt": "b"})]
    assert list(rows(Path(f"{tmp_path}/two:test"))) == [("two:1", {"prompt": "b"})]
    with pytest.raises(
        DataError, match=r"two: has several splits. Write one of .*two:train, .*two:test\."
    ):
        list(rows(tmp_path / "two"))
    with pytest.raises(DataError, match=r"two: has no split dev. Write one of"):
        list(rows(Path(f"{tmp_path}/two:dev")))


@pytest.mark.parametrize(
    ("named", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("openai/gsm8k/main:train[:10]", ("openai/gsm8k", "main", "train[:10]")),
    ],
)
def test_data_sets_of_the_hub(monkeypatch, named, asked):
    datasets = pytest.importorskip("datasets")

    def load(name, config, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "why_not_on_hub", lambda *_: None)
    assert list(rows(Path(named))) == [(f"{named}:1", {"prompt": "a"})]


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    offline = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def load(*_, **__):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach the hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for why, sentence in {
        None: r"the hub gives no data \(Couldn't reach the hub\)\.",
        "the hub has no such data set.": r"the hub has no such data set\.",
    }.items():
        monkeypatch.setattr(files, "why_not_on_hub", lambda *_, why=why: why)
        with pytest.raises(
            DataError, match=rf"data/promts: is no file or folder here, and {sentence}"
        ):
            list(rows(Path("data/promts")))
    assert offline == [False, True], "the cache alone is asked once the hub has said no"
    assert not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"data/promts.jsonl: no such file\."):
        list(rows(Path("data/promts.jsonl")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError,
        match=rf"data/promts: no such file\. .* need {re.escape(install_command('datasets'))}\.",
    ):
        list(rows(Path("data/promts")))
