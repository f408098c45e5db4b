"""A shape of rows that a user wrote: what it makes of a row, and what is said where it does not fit."""

import json

import pytest
from typer.testing import CliRunner

import quartet
from quartet.cli import app
from quartet.cli.common import CHECK_FAILED
from quartet.config.toml import ConfigError, read_settings
from quartet.data import DataError
from quartet.data.row_shape import RowShape
from quartet.data.shapes import read_examples


class Quiz(RowShape):
    """Questions with a letter that says which of the choices is right."""

    columns = ("q", "choices", "right")
    intro: str = quartet.Field(default="", description="What stands before the question.")

    def __call__(self, row):
        if row["right"] not in row["choices"]:
            raise ValueError("right is none of the choices.")
        answer = row["choices"][row["right"]]
        return {"prompt": self.intro + row["q"], "completion": answer, "letter": row["right"]}


class Broken(RowShape):
    def __call__(self, row):
        return row["nothing"] if "q" in row else [row]


ROW = {"q": "2 + 2?", "choices": {"a": "3", "b": "4"}, "right": "b"}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_becomes_an_example_and_other_columns_are_kept(tmp_path):
    [example] = read_examples(written(tmp_path, ROW), "demonstrations", {}, Quiz(intro="Q: "))
    assert (example.prompt, example.completion) == ("Q: 2 + 2?", "4")
    assert example.extra == {"letter": "b"}


def test_data_columns_are_renamed_first(tmp_path):
    row = {"question": ROW["q"], "choices": ROW["choices"], "right": "a"}
    path = written(tmp_path, row)
    [example] = read_examples(path, "demonstrations", {"q": "question"}, Quiz())
    assert example.completion == "3"


@pytest.mark.parametrize(
    ("rows", "purpose", "shape", "sentence"),
    [
        ([{"a": 1}], "prompts", Quiz(), "needs the columns q, choices, right; the file has a."),
        ([ROW], "comparisons", Quiz(), "returns prompt, completion, letter; comparisons need"),
        ([ROW, ROW | {"right": "c"}], "prompts", Quiz(), "rows.jsonl:2: right is none of the"),
        ([ROW], "prompts", Broken(), "failed: KeyError('nothing')."),
        ([{"a": 1}], "prompts", Broken(), "returned a list; it must be a dict."),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, rows, purpose, shape, sentence):
    with pytest.raises(DataError) as caught:
        read_examples(written(tmp_path, *rows), purpose, {}, shape)
    assert sentence in str(caught.value)


def test_a_shape_is_named_in_a_file_with_its_settings_or_alone(tmp_path):
    text = f'recipe = "sft"\npolicy.model = "m"\ndata.train = "{written(tmp_path, ROW)}"\n'
    (tmp_path / "run.toml").write_text(text)
    settings = [f'data.shape={{type="{__file__}:Quiz", intro="Q: "}}']
    assert read_settings(tmp_path / "run.toml", settings).config.data.shape.intro == "Q: "
    alone = read_settings(tmp_path / "run.toml", [f"data.shape={__file__}:Quiz"]).config
    assert type(alone.data.shape).__name__ == "Quiz"
    with pytest.raises(ConfigError, match="no such file"):
        read_settings(tmp_path / "run.toml", ["data.shape=gone.py:Quiz"])
    with pytest.raises(ConfigError, match="openai.*sharegpt.*alpaca"):
        read_settings(tmp_path / "run.toml", ["data.shape=nothing"])


def test_quartet_data_reads_rows_by_a_shape(tmp_path):
    path = written(tmp_path, ROW, ROW | {"q": "1 + 3?"}, ROW | {"right": "c"})
    done = CliRunner().invoke(app, ["data", str(path), "--shape", f"{__file__}:Quiz"])
    text = " ".join(done.output.split())
    assert done.exit_code == CHECK_FAILED, "the third row cannot be used"
    assert "demonstrations" in text and "right is none of the choices" in text
    assert "2 + 2?⟦4⟧" in text
    gone = CliRunner().invoke(app, ["data", str(path), "--shape", f"{__file__}:Nothing"])
    assert gone.exit_code == 2 and "Nothing" in gone.output
